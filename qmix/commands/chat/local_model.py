"""LocalModel: a ChatModel in this process, with a KV cache that is kept between replies.

Whatever beginning of a prompt the cache already holds is not computed again. Knows nothing of
terminals.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from qmix.commands.chat import energy, local_facts
from qmix.commands.chat.chat_model import Answer, Bound, Prompt, TokenChoice, Turn
from qmix.commands.chat.reply_stats import Finish, ReplyStats
from qmix.commands.chat.saved_chat import ModelIdentity
from qmix.commands.chat.token_choices import ChoiceRecord
from qmix.errors import UsageError
from qmix.experts.statistics import Statistics
from qmix.generation.config import GenerationConfig
from qmix.generation.drafted_text import Drafter
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import Token, stream
from qmix.generation.prompt_cache import PromptCache
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.planning.budget import PREFILL_CHUNK
from qmix.text.chat_format import INST_NAME, ChatFormat
from qmix.text.chat_format import chat_format as own_format
from qmix.text.chat_template import Message
from qmix.text.common_prefix import common_prefix
from qmix.text.tokenizer import LlamaTokenizer


@dataclass(frozen=True)
class ModelSource:
    """Where a model came from, and which one it is."""

    directory: Path
    identity: ModelIdentity


class LocalModel:
    """A causal LM with its tokenizer, chat format and cache. See ChatModel.

    Args:
        chat_format: makes prompts of the turns; default: the checkpoint's own.
        prompts: where beginnings of conversations are found, and kept on demand.
        context: tokens of prompt and reply together at most; default: the model's positions.

    Raises:
        UsageError: a context that is too small, or larger than the model's.
    """

    def __init__(
        self,
        source: ModelSource,
        causal_lm: MixtralForCausalLM,
        tokenizer: LlamaTokenizer,
        *,
        chat_format: ChatFormat | None = None,
        context: int | None = None,
        prompts: PromptCache | None = None,
    ) -> None:
        limit = causal_lm.config.max_position_embeddings
        if context is not None and not 16 <= context <= limit:
            raise UsageError(
                "out of range", where="context", expected=f"16 to {limit}", found=context
            )
        self.source = source
        self.causal_lm = causal_lm
        self.tokenizer = tokenizer
        self.format = own_format(tokenizer) if chat_format is None else chat_format
        self.context = context or limit
        self.cache: KVCache = causal_lm.new_cache(1)
        self.cached: tuple[int, ...] = ()  # the ids that it holds
        self.drafter = Drafter()
        self._prompts = prompts

    @property
    def identity(self) -> ModelIdentity:
        """See ChatModel."""
        return self.source.identity

    @property
    def template(self) -> str | None:
        """See ChatModel."""
        return None if self.format.name == INST_NAME else self.format.name

    def facts(self) -> tuple[str, ...]:
        """See ChatModel."""
        return local_facts.facts(self)

    def prompt(self, system: str | None, turns: Sequence[Turn]) -> Prompt:
        """See ChatModel: the template's ids, with each answer's ids as they were generated."""
        messages = [Message("system", system)] if system else []
        for turn in turns[:-1]:
            shown = _ids(turn.answer[turn.hidden :])
            messages += [Message("user", turn.user), Message("assistant", "", shown)]
        last = turns[-1]
        before = self.format.prompt([*messages, Message("user", last.user)])
        ids = (*before, *_ids(last.answer[last.hidden :]))
        return Prompt(system, tuple(turns), ids, len(ids), self._held(ids))

    def reply(self, prompt: Prompt, config: GenerationConfig) -> "LocalReply":
        """See ChatModel."""
        return LocalReply(self, prompt, config)

    def text(self, answer: Answer) -> str:
        """See ChatModel."""
        return self.tokenizer.decode(list(_ids(answer)), skip_special_tokens=True)

    def answer(self, text: str) -> Answer:
        """See ChatModel; no text becomes a control token."""
        return tuple(self._encoded(text))

    def length(self, answer: Answer) -> int:
        """See ChatModel."""
        return len(answer)

    def tokens(self, text: str) -> list[tuple[str, int]]:
        """See ChatModel."""
        return [(self.piece(index), index) for index in self._encoded(text)]

    def count(self, text: str) -> int:
        """See ChatModel."""
        return len(self._encoded(text))

    def prompt_text(self, prompt: Prompt) -> str:
        """See ChatModel."""
        return self.tokenizer.decode(list(prompt.ids), skip_special_tokens=False)

    def bound(self, stats: ReplyStats) -> Bound:
        """See ChatModel."""
        return local_facts.bound(self, stats.context_tokens or 0, stats.experts)

    def keep_cache(self) -> int:
        """See ChatModel."""
        if self._prompts is None:
            return 0
        return self._prompts.keep(self.cache, self.cached)

    def _held(self, ids: tuple[int, ...]) -> int:
        """How much of a prompt the cache holds, once what is kept of it has been read."""
        held = self._reusable(ids)
        length = 0 if self._prompts is None else self._prompts.restore(self.cache, ids, held)
        if not length:
            return held
        self.cached = ids[:length]
        return self._reusable(ids)

    def _reusable(self, ids: tuple[int, ...]) -> int:
        common = common_prefix(ids, self.cached)
        return self.cache.longest_rewindable(min(common, len(ids) - 1))

    def release(self) -> None:
        """Free model and cache, so that another one has room."""
        del self.causal_lm, self.tokenizer, self.format, self.cache
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def piece(self, index: int) -> str:
        """A token as it is written in the vocabulary."""
        return f"{self.tokenizer.convert_ids_to_tokens(index)}"

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return ids


class LocalReply:
    """See Reply. However its iteration ends (by itself, `close`, KeyboardInterrupt), what was
    generated is in the model's cache.
    """

    choices_are = "as the sampler saw them"

    def __init__(self, model: LocalModel, prompt: Prompt, config: GenerationConfig) -> None:
        self.prompt = prompt
        self._model = model
        self._space = model.context - len(prompt.ids)
        wanted = config.max_new_tokens or self._space
        self._is_limited = wanted > self._space  # by the context, and not by max_new_tokens
        self._config = replace(config, max_new_tokens=min(wanted, self._space))
        self._ids: list[int] = []
        self._choices = ChoiceRecord()
        self._last: Token | None = None
        self._first_token_s = 0.0
        self._energy_j: float | None = None
        self._experts: Statistics | None = None

    def __iter__(self) -> Iterator[str]:
        """See Reply."""
        model = self._model
        model.cache.rewind(self.prompt.cached_tokens)
        store = model.causal_lm.store
        before = None if store is None else store.statistics()
        meter = energy.Meter.of(model.causal_lm.device)
        try:
            inputs = GenerationInputs(
                torch.tensor([self.prompt.ids]),
                self._config,
                cache=model.cache,
                tokenizer=model.tokenizer,
                starts_new_text=not self.prompt.turns[-1].answer,
                drafter=model.drafter,
            )
            for token in stream(model.causal_lm, inputs):
                self._last = token
                self._first_token_s = self._first_token_s or token.elapsed_s
                self._ids.append(int(token.ids))
                self._choices.add(self._ids[-1], token.scores[0])
                if token.texts[0]:
                    yield token.texts[0]
        finally:
            model.cached = (*self.prompt.ids, *self._ids)[: model.cache.length]
            self._energy_j = meter.joules()
            if store is not None and before is not None:
                self._experts = store.statistics().since(before)

    @property
    def answer(self) -> Answer:
        """See Reply."""
        return tuple(self._ids[:-1] if self._finish == "stop" else self._ids)

    def stats(self) -> ReplyStats:
        """See Reply."""
        prompt = self.prompt
        return ReplyStats(
            prompt_tokens=len(prompt.ids),
            cached_tokens=prompt.cached_tokens,
            new_tokens=len(self._ids),
            first_token_s=self._first_token_s,
            elapsed_s=0.0 if self._last is None else self._last.elapsed_s,
            context_tokens=len(prompt.ids) + len(self._ids),
            context_limit=self._model.context,
            finish=self._finish,
            experts=self._experts,
            energy_j=self._energy_j,
            drafts=None if self._last is None else self._last.drafts,
        )

    def choices(self) -> list[TokenChoice]:
        """See Reply: after temperature, filters and penalties; an excluded token has 0."""
        piece = self._model.piece
        return [
            TokenChoice(
                piece(choice.id),
                choice.probability,
                tuple((piece(i), share) for i, share in choice.likeliest if i != choice.id),
            )
            for choice in self._choices.choices()
        ]

    @torch.no_grad()
    def expert_counts(self) -> list[list[int]]:
        """See Reply. It is computed once more, on the cache of its prompt."""
        if not self._ids:
            raise UsageError("there is no reply yet")
        model, begun = self._model, len(self.prompt.ids) - 1  # the position of the first token
        causal_lm, cache = model.causal_lm, model.cache
        ids, start = model.cached, cache.longest_rewindable(begun)
        cache.rewind(start)
        counts = torch.zeros(1, dtype=torch.int64)
        try:
            for first in range(start, len(ids), PREFILL_CHUNK):
                chunk = torch.tensor([ids[first : first + PREFILL_CHUNK]]).to(causal_lm.device)
                decoded = causal_lm.model.decode(causal_lm.model.embed(chunk), cache=cache)
                use = decoded.expert_use(causal_lm.config.num_experts_per_tok)
                counts = counts + use[:, max(begun - first, 0) :].sum(1).cpu()
        finally:
            model.cached = ids[: cache.length]
        found: list[list[int]] = counts.tolist()
        return found

    @property
    def _finish(self) -> Finish:
        """Why it ended, after its last token."""
        last = self._last
        if last is None or last.finish is None:
            return "stopped"
        if last.finish == "length":
            return "context" if self._is_limited else "length"
        return "stop" if int(last.ids) in self._config.eos_ids else "stop_string"


def _ids(answer: Answer) -> tuple[int, ...]:
    """The pieces of an answer of this model."""
    return cast(tuple[int, ...], answer)
