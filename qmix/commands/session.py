"""A conversation: its turns, and the KV cache that is kept between them.

Every prompt is the whole conversation's token ids; whatever prefix the cache already holds is not
computed again. Knows nothing of terminals.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch

from qmix.commands.chat import energy
from qmix.commands.chat.reply_stats import Finish, ReplyStats
from qmix.commands.chat.token_choices import ChoiceRecord
from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import Token, stream
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.planning.budget import PREFILL_CHUNK
from qmix.text.chat_format import ChatFormat
from qmix.text.chat_format import chat_format as own_format
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer

_LEAST_SHOWN = 32  # ids of a long answer that a continuation sees at least


@dataclass(frozen=True)
class Turn:
    """What the user said, and the ids of the answer without the closing end-of-sequence.

    Attributes:
        hidden: how many of the first ids prompts leave out, because the context has no place.
        attempt: how many answers were thrown away before this one.
        finish: why the answer ended; None if it is not known.
    """

    user: str
    answer: tuple[int, ...] = ()
    hidden: int = 0
    attempt: int = 0
    finish: Finish | None = None


@dataclass(frozen=True, kw_only=True)
class PreparedPrompt:
    """A conversation's ids up to where the reply begins.

    Attributes:
        turn: the turn that the reply becomes part of, with what it holds already.
        replaces: whether it takes the place of the last turn, once a token has been generated.
        config: how the reply is sampled.
        cached_tokens: how long a prefix of `ids` the cache holds.
        dropped_turns, dropped_tokens: what did not fit the context.
    """

    turn: Turn
    replaces: bool
    config: GenerationConfig
    ids: tuple[int, ...]
    cached_tokens: int
    dropped_turns: int
    dropped_tokens: int


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
        self.format = own_format(tokenizer) if chat_format is None else chat_format
        self.system = system
        self.context = context or limit
        self.turns: list[Turn] = []
        self.replies: list[ReplyStats] = []
        self.last_prompt: tuple[int, ...] = ()  # as it was given to the model
        self.choices = ChoiceRecord()  # of the last reply
        self._cache: KVCache = model.new_cache(1)
        self._cached: tuple[int, ...] = ()

    @property
    def stats(self) -> ReplyStats | None:
        """The last reply in numbers."""
        return self.replies[-1] if self.replies else None

    def clear(self) -> None:
        """Forget all turns and their statistics; the system prompt stays."""
        self.turns.clear()
        self.replies.clear()
        self.last_prompt = ()
        self.choices = ChoiceRecord()

    def release(self) -> None:
        """Let go of the model, so that another one has room; the turns' texts go too."""
        self.clear()
        del self.model, self.tokenizer, self.format, self._cache
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def expert_counts(self) -> list[list[int]]:
        """How often each token of the last reply was computed by each expert, layer by layer.

        The reply is computed once more, on the cache of its prompt.

        Raises:
            UsageError: there is no reply yet.
        """
        if not self.choices:
            raise UsageError("there is no reply yet")
        begun = len(self.last_prompt) - 1  # the position that gave the first token
        ids, start = self._cached, self._cache.longest_rewindable(begun)
        self._cache.rewind(start)
        counts = torch.zeros(1, dtype=torch.int64)
        try:
            for first in range(start, len(ids), PREFILL_CHUNK):
                chunk = torch.tensor([ids[first : first + PREFILL_CHUNK]]).to(self.model.device)
                decoded = self.model.model.decode(self.model.model.embed(chunk), cache=self._cache)
                assert decoded.router_logits is not None
                logits = torch.stack(tuple(decoded.router_logits))[:, max(begun - first, 0) :]
                chosen = logits.topk(self.model.config.num_experts_per_tok, -1).indices
                marks = torch.zeros_like(logits, dtype=torch.int64).scatter_(-1, chosen, 1)
                counts = counts + marks.sum(1).cpu()
        finally:
            self._cached = ids[: self._cache.length]
        found: list[list[int]] = counts.tolist()
        return found

    def undo(self) -> Turn:
        """Forget the last turn, and return it.

        Raises:
            UsageError: there is none.
        """
        last = self._last()
        self.turns.pop()
        return last

    def text_of(self, turn: Turn) -> str:
        """The answer of a turn."""
        return self.tokenizer.decode(list(turn.answer), skip_special_tokens=True)

    def restore(self, texts: Sequence[tuple[str, str]]) -> None:
        """Replace all turns by these user messages and answers."""
        turns = [Turn(user, self._ids_of_answer(answer)) for user, answer in texts]
        self.clear()
        self.turns = turns

    def prepare(self, text: str) -> PreparedPrompt:
        """The ids of the conversation with `text` as its next user message.

        Where they leave too little space for a reply, the oldest turns are dropped, down to half of
        the context at once, so that the cached prefix survives for some turns.

        Raises:
            UsageError: the message alone does not fit; the error names both token counts.
        """
        return self._prepared(Turn(text), self.config, replaces=False)

    def prepare_again(
        self, text: str | None = None, temperature: float | None = None
    ) -> PreparedPrompt:
        """The ids for another answer to the last message, or to `text` in its place.

        Args:
            temperature: of this one reply.

        Raises:
            UsageError: there is no turn; as `prepare`; a temperature out of range.
        """
        config = self.config
        if temperature is not None:
            change = {"temperature": temperature, "do_sample": temperature != 0}
            config = config.updated(change)
        last = self._last()
        attempt = last.attempt + 1 if text is None else 0
        turn = Turn(last.user if text is None else text, attempt=attempt)
        return self._prepared(turn, _reseeded(config, attempt), replaces=True)

    def prepare_continuation(self) -> PreparedPrompt:
        """The ids for more of the last answer. If it fills the context, its beginning is left out.

        Raises:
            UsageError: there is no turn, or the model has ended the answer itself.
        """
        last = self._last()
        if last.finish == "stop":
            raise UsageError("the reply is whole", remedy="/regen asks for another.")
        config = _reseeded(self.config, len(last.answer))
        return self._prepared(last, config, replaces=True)

    def _last(self) -> Turn:
        if not self.turns:
            raise UsageError("there is no turn yet")
        return self.turns[-1]

    def _prepared(self, turn: Turn, config: GenerationConfig, *, replaces: bool) -> PreparedPrompt:
        reserve = min(config.max_new_tokens or 256, self.context // 4)
        earlier = self.turns[:-1] if replaces else self.turns
        ids = self._prompt([*earlier, turn])
        before, dropped = len(ids), 0
        if before + reserve > self.context:
            while dropped < len(earlier) and len(ids) + reserve > self.context // 2:
                dropped += 1
                ids = self._prompt([*earlier[dropped:], turn])
        if len(ids) + reserve > self.context and turn.answer:
            turn = self._shortened(turn, len(ids), reserve)
            ids = self._prompt([*earlier[dropped:], turn])
        if len(ids) + reserve > self.context:
            raise self._too_long(len(ids), reserve)
        del self.turns[:dropped]
        common = sum(
            1
            for _ in takewhile(
                lambda pair: pair[0] == pair[1], zip(ids, self._cached, strict=False)
            )
        )
        return PreparedPrompt(
            turn=turn,
            replaces=replaces,
            config=config,
            ids=ids,
            cached_tokens=self._cache.longest_rewindable(min(common, len(ids) - 1)),
            dropped_turns=dropped,
            dropped_tokens=before - len(ids),
        )

    def _shortened(self, turn: Turn, length: int, reserve: int) -> Turn:
        """The turn with the beginning of its answer hidden, so that half of the context is free."""
        shown = len(turn.answer) - turn.hidden
        other = length - shown
        most = self.context - reserve - other
        kept = max(0, min(max(self.context // 2 - other, _LEAST_SHOWN), most))
        return replace(turn, hidden=len(turn.answer) - kept) if kept < shown else turn

    def _too_long(self, length: int, reserve: int) -> UsageError:
        return UsageError(
            "the message does not fit the context",
            expected=f"at most {self.context - reserve} tokens ({self.context} of context, "
            f"{reserve} reserved for the reply)",
            found=f"{length} tokens",
            remedy="Shorten it, or the system prompt.",
        )

    def reply(self, prompt: PreparedPrompt) -> Iterator[str]:
        """Generate the answer, piece by piece.

        However the iteration ends (end, `close`, KeyboardInterrupt), what was generated is kept as
        the turn's answer, in history and cache alike. Without a single token all turns stay as they
        were.
        """
        self._cache.rewind(prompt.cached_tokens)
        space = self.context - len(prompt.ids)
        wanted = prompt.config.max_new_tokens or space
        config = replace(prompt.config, max_new_tokens=min(wanted, space))
        answer: list[int] = []
        last: Token | None = None
        first_token_s = 0.0
        self.last_prompt, self.choices = prompt.ids, ChoiceRecord()
        store = self.model.store
        before = None if store is None else store.statistics()
        meter = energy.Meter.of(self.model.device)
        try:
            inputs = GenerationInputs(
                torch.tensor([prompt.ids]),
                config,
                cache=self._cache,
                tokenizer=self.tokenizer,
                starts_new_text=not prompt.turn.answer,
            )
            for last in stream(self.model, inputs):
                first_token_s = first_token_s or last.elapsed_s
                answer.append(int(last.ids))
                self.choices.add(answer[-1], last.scores[0])
                if last.texts[0]:
                    yield last.texts[0]
        finally:
            conversation = (*prompt.ids, *answer)
            self._cached = conversation[: self._cache.length]
            finish = _finish(last, config, limited=wanted > space)
            self._keep(prompt, answer, finish)
            self.replies.append(
                ReplyStats(
                    prompt_tokens=len(prompt.ids),
                    cached_tokens=prompt.cached_tokens,
                    dropped_turns=prompt.dropped_turns,
                    dropped_tokens=prompt.dropped_tokens,
                    new_tokens=len(answer),
                    first_token_s=first_token_s,
                    elapsed_s=0.0 if last is None else last.elapsed_s,
                    context_tokens=len(conversation),
                    context_limit=self.context,
                    finish=finish,
                    experts=None
                    if store is None or before is None
                    else store.statistics().since(before),
                    energy_j=meter.joules(),
                )
            )

    def _keep(self, prompt: PreparedPrompt, answer: list[int], finish: Finish) -> None:
        """Make the new ids part of their turn."""
        if not answer:
            return
        ended = finish == "stop"
        whole = (*prompt.turn.answer, *(answer[:-1] if ended else answer))
        first = len(self.turns) - prompt.replaces
        self.turns[first:] = [replace(prompt.turn, answer=whole, finish=finish)]

    def _ids_of_answer(self, text: str) -> tuple[int, ...]:
        """The ids of an answer whose own ids are not known; no text becomes a control token."""
        return tuple(
            self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        )

    def _prompt(self, turns: Sequence[Turn]) -> tuple[int, ...]:
        """The template's ids, with each answer's ids as they were generated."""
        messages = [Message("system", self.system)] if self.system else []
        for turn in turns[:-1]:
            shown = turn.answer[turn.hidden :]
            messages += [Message("user", turn.user), Message("assistant", "", shown)]
        last = turns[-1]
        ids = self.format.prompt([*messages, Message("user", last.user)])
        return (*ids, *last.answer[last.hidden :])


def _reseeded(config: GenerationConfig, by: int) -> GenerationConfig:
    """The configuration with another seed, if it has one: the same would draw the same again."""
    if config.seed is None:
        return config
    return config.updated({"seed": (config.seed + by) % (1 << 64)})


def _finish(last: Token | None, config: GenerationConfig, *, limited: bool) -> Finish:
    """Why a reply ended, after its last token.

    Args:
        limited: whether the context, and not max_new_tokens, was its limit.
    """
    if last is None or last.finish is None:
        return "stopped"
    if last.finish == "length":
        return "context" if limited else "length"
    return "stop" if int(last.ids) in config.eos_ids else "stop_string"
