"""A conversation: its turns, and the KV cache that is kept between them.

Every prompt is the whole conversation's token ids; whatever prefix the cache already holds is not
computed again. Knows nothing of terminals.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch

from qmix.errors import UsageError
from qmix.experts.statistics import Statistics
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import Finish, stream
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.text.chat_format import ChatFormat
from qmix.text.chat_format import chat_format as own_format
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer


@dataclass(frozen=True)
class Turn:
    """What the user said, and the ids of the answer without the closing end-of-sequence."""

    user: str
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """A conversation's ids up to a user message, ready for a reply.

    Attributes:
        text: the user message.
        cached_tokens: how long a prefix of `ids` the cache holds.
        dropped_turns, dropped_tokens: what did not fit the context.
    """

    text: str
    ids: tuple[int, ...]
    cached_tokens: int
    dropped_turns: int
    dropped_tokens: int


@dataclass(frozen=True, kw_only=True)
class ReplyStats:
    """One reply in numbers; times in seconds.

    Attributes:
        experts: what the store did during the reply, if the model is offloaded.
    """

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    first_token_s: float
    elapsed_s: float
    context_tokens: int
    context_limit: int
    finish: Finish | None
    experts: Statistics | None = None

    @property
    def details(self) -> str:
        """The line of `str`, and another for an offloaded model's experts."""
        return str(self) if self.experts is None else f"{self}\n{self.experts}"

    @property
    def tokens_per_s(self) -> float:
        """Decode speed without the first token, whose time is the prefill's; 0 for one token."""
        after_first = self.elapsed_s - self.first_token_s
        return (self.new_tokens - 1) / after_first if after_first > 0 else 0.0

    def __str__(self) -> str:
        share = round(100 * self.context_tokens / self.context_limit)
        stopped = "" if self.finish == "stop" else " · cut short"
        return (
            f"{self.new_tokens} tokens · {self.tokens_per_s:.1f} tok/s · "
            f"first token {self.first_token_s:.2f} s · "
            f"context {self.context_tokens}/{self.context_limit} ({share} %) · "
            f"cached {self.cached_tokens}{stopped}"
        )


class Session:
    """Turns, system prompt and cache of one conversation.

    Args:
        chat_format: makes prompts of the turns; default: the checkpoint's own.
        context: tokens of prompt and reply together at most; default: the model's positions.

    Raises:
        UsageError: a context that is too small, or larger than the model's.
    """

    def __init__(
        self,
        model: MixtralForCausalLM,
        tokenizer: LlamaTokenizer,
        config: GenerationConfig,
        *,
        chat_format: ChatFormat | None = None,
        system: str | None = None,
        context: int | None = None,
    ) -> None:
        limit = model.config.max_position_embeddings
        if context is not None and not 16 <= context <= limit:
            raise UsageError(
                "out of range", where="context", expected=f"16 to {limit}", found=context
            )
        self.model = model
        self.tokenizer = tokenizer
        self.config = config
        self._format = own_format(tokenizer) if chat_format is None else chat_format
        self.system = system
        self.context = context or limit
        self.turns: list[Turn] = []
        self.stats: ReplyStats | None = None
        self._cache: KVCache = model.new_cache(1)
        self._cached: tuple[int, ...] = ()

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()

    def prepare(self, text: str) -> PreparedPrompt:
        """The ids of the conversation with `text` as its next user message.

        Where they leave too little space for a reply, the oldest turns are dropped, down to half of
        the context at once, so that the cached prefix survives for some turns.

        Raises:
            UsageError: the message alone does not fit; the error names both token counts.
        """
        reserve = min(self.config.max_new_tokens or 256, self.context // 4)
        ids = self._prompt([*self.turns, Turn(text)])
        before, dropped = len(ids), 0
        if before + reserve > self.context:
            while dropped < len(self.turns) and len(ids) + reserve > self.context // 2:
                dropped += 1
                ids = self._prompt([*self.turns[dropped:], Turn(text)])
        if len(ids) + reserve > self.context:
            raise UsageError(
                "the message does not fit the context",
                expected=f"at most {self.context - reserve} tokens ({self.context} of context, "
                f"{reserve} reserved for the reply)",
                found=f"{len(ids)} tokens",
                remedy="Shorten it, or the system prompt.",
            )
        del self.turns[:dropped]
        common = sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(ids, self._cached, strict=False)
            )
        )
        return PreparedPrompt(
            text=text,
            ids=ids,
            cached_tokens=self._cache.longest_rewindable(min(common, len(ids) - 1)),
            dropped_turns=dropped,
            dropped_tokens=before - len(ids),
        )

    def reply(self, prompt: PreparedPrompt) -> Iterator[str]:
        """Generate the answer, piece by piece.

        However the iteration ends (end, `close`, KeyboardInterrupt), what was generated is kept as
        the turn's answer, in history and cache alike; a turn without a single token is dropped.
        """
        self._cache.rewind(prompt.cached_tokens)
        space = self.context - len(prompt.ids)
        wanted = self.config.max_new_tokens or space
        config = replace(self.config, max_new_tokens=min(wanted, space))
        answer: list[int] = []
        finish: Finish | None = None
        first_token_s = elapsed_s = 0.0
        store = self.model.store
        before = None if store is None else store.statistics()
        try:
            inputs = GenerationInputs(
                torch.tensor([prompt.ids]),
                config,
                cache=self._cache,
                tokenizer=self.tokenizer,
                starts_new_text=True,
            )
            for token in stream(self.model, inputs):
                elapsed_s, finish = token.elapsed_s, token.finish
                first_token_s = first_token_s or elapsed_s
                answer.append(int(token.ids))
                if token.texts[0]:
                    yield token.texts[0]
        finally:
            conversation = (*prompt.ids, *answer)
            self._cached = conversation[: self._cache.length]
            new_tokens = len(answer)
            if answer and answer[-1] in config.eos_ids:
                answer.pop()
            if new_tokens:
                self.turns.append(Turn(prompt.text, tuple(answer)))
            self.stats = ReplyStats(
                prompt_tokens=len(prompt.ids),
                cached_tokens=prompt.cached_tokens,
                new_tokens=new_tokens,
                first_token_s=first_token_s,
                elapsed_s=elapsed_s,
                context_tokens=len(conversation),
                context_limit=self.context,
                finish=finish,
                experts=None
                if store is None or before is None
                else store.statistics().since(before),
            )

    def _prompt(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """The template's ids, with each answer's ids as they were generated."""
        messages = [Message("system", self.system)] if self.system else []
        for turn in turns[:-1]:
            messages += [Message("user", turn.user), Message("assistant", "", turn.answer)]
        return tuple(self._format.prompt([*messages, Message("user", turns[-1].user)]))
