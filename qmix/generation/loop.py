"""The generation loop: prefill in chunks, decode token by token, stop.

Knows a model only as a CausalLM, and text only through its rows.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.generation.inputs import GenerationInputs
from qmix.generation.padding import position_ids
from qmix.generation.rows import Rows
from qmix.generation.sampling import checked
from qmix.generation.streamers import Streamer
from qmix.generation.token_selector import SampledStep, SampleFn, TokenSelector
from qmix.nn.cache import KVCache
from qmix.nn.outputs import GenerateDecoderOnlyOutput
from qmix.planning.budget import GPU_PREFILL_CHUNK, PREFILL_CHUNK

# Columns that a cache has slots for at first beyond the prompt; it grows where more follow.
_FIRST_NEW_COLUMNS = 1024

Finish = Literal["stop", "length"]


class CausalLM(Protocol):
    """What the loop asks of a model."""

    @property
    def config(self) -> MixtralConfig: ...
    @property
    def device(self) -> torch.device: ...
    def new_cache(self, batch: int, capacity: int) -> KVCache: ...
    def next_logits(
        self,
        input_ids: Tensor | None,
        cache: KVCache,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor: ...
    def sample_next(
        self, ids: Tensor, cache: KVCache, attention_mask: Tensor | None, sample_fn: SampleFn
    ) -> SampledStep | None: ...


@dataclass(frozen=True, eq=False)
class Token:
    """One decode step.

    Attributes:
        ids: the new id of each row (B,), on the CPU; pad_id for rows that have ended.
        texts: the text that each row's token completes, whole characters only; empty without a
            tokenizer.
        elapsed_s: seconds since generation began.
        finish: on the last step: `stop` if every row ended by itself, else `length`.
        logits, scores: float32 (B, V), before and after all processors; excluded ids at -inf.
    """

    ids: Tensor
    texts: tuple[str, ...]
    elapsed_s: float
    finish: Finish | None
    logits: Tensor
    scores: Tensor


def stream(model: CausalLM, inputs: GenerationInputs) -> Iterator[Token]:
    """Generate after a prompt, one Token a step.

    Raises:
        UsageError: as GenerationInputs.check; a cache of another model or of the whole prompt.
    """
    start = time.perf_counter()
    inputs = _prepared(model, inputs)
    rows, steps = Rows(inputs, model.device), _Steps(model, inputs)
    steps.prefill(inputs.columns, rows)
    budget = inputs.config.new_tokens(inputs.columns.shape[1])
    for index in range(budget):
        last = index + 1 == budget
        chosen = steps.choose(rows, index)
        if not last:
            steps.sample_ahead(chosen.ids, rows)
        ids, texts = rows.append(chosen.ids, chosen.scores, last=last)
        finish: Finish | None = "stop" if bool(rows.ended.all()) else "length" if last else None
        elapsed_s = time.perf_counter() - start
        yield Token(ids, texts, elapsed_s, finish, chosen.logits, chosen.scores)
        if finish is not None:
            return
        steps.feed(rows)


def generate(
    model: CausalLM, inputs: GenerationInputs, streamer: Streamer | None = None
) -> Tensor | GenerateDecoderOnlyOutput:
    """Prompt and new ids, (B, P + n) on the prompt's device; padding stays where it was.

    Args:
        streamer: gets the prompt, then each new id, then `end()`; one row only.

    Raises:
        UsageError: as `stream`; a streamer for several rows.
    """
    config = inputs.config
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        found = type(streamer).__name__
        raise UsageError("no streamer", where="streamer", expected="put and end", found=found)
    inputs.check(model.config.hidden_size)
    inputs = _with_cache(model, inputs.repeated(config.num_return_sequences))
    prompt_ids, device = inputs.prompt_ids, inputs.columns.device
    if streamer is not None and len(prompt_ids) != 1:
        found = f"{len(prompt_ids)} rows"
        raise UsageError("a streamer takes one row", where="input_ids", found=found)
    sequences = [prompt_ids.to(device)]
    scores: list[Tensor] = []
    logits: list[Tensor] = []
    with _ended(streamer):
        if streamer is not None:
            streamer.put(prompt_ids.cpu())
        for token in stream(model, inputs):
            sequences.append(token.ids[:, None].to(device))
            if config.output_scores:
                scores.append(token.scores)
            if config.output_logits:
                logits.append(token.logits)
            if streamer is not None:
                streamer.put(token.ids)
    if not config.return_dict_in_generate:
        return torch.cat(sequences, 1)
    return GenerateDecoderOnlyOutput(
        sequences=torch.cat(sequences, 1),
        scores=tuple(scores) or None,
        logits=tuple(logits) or None,
        past_key_values=inputs.cache if config.use_cache else None,
    )


@contextmanager
def _ended(streamer: Streamer | None) -> Iterator[None]:
    """Tell a streamer of the end, after a failure too: another thread may wait for it."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


class _Steps:
    """The model's side of a generation: from the ids so far to the next ones."""

    def __init__(self, model: CausalLM, inputs: GenerationInputs) -> None:
        """`inputs` must have a cache."""
        config = inputs.config
        assert inputs.cache is not None
        self._model = model
        self._cache = inputs.cache
        self._uses_cache = config.use_cache
        generator = None
        if config.seed is not None:
            generator = torch.Generator(model.device).manual_seed(config.seed)
        self._selector = TokenSelector(config, inputs.logits_processor, generator)
        self._sample_fn = self._selector.sample_fn if config.use_cache else None
        default = GPU_PREFILL_CHUNK if model.device.type == "cuda" else PREFILL_CHUNK
        self._chunk = config.prefill_chunk_size or default
        self._logits = torch.empty(0)  # of the next step, unless it was sampled ahead
        self._ahead: SampledStep | None = None

    def prefill(self, columns: Tensor, rows: Rows) -> None:
        """Feed the columns of the prompt that the cache does not hold yet."""
        self._logits = self._prefilled(columns.to(self._model.device), rows, self._cache)

    def choose(self, rows: Rows, step: int) -> SampledStep:
        """The next ids, on the CPU; `step` new tokens came before them."""
        if self._ahead is None:
            return self._selector.select(self._logits, rows.input_ids, rows.ids_mask, step)
        ahead = self._ahead
        return replace(ahead, ids=checked(ahead.ids.cpu()))

    def sample_ahead(self, ids: Tensor, rows: Rows) -> None:
        """Start the step after `ids`, so that the device runs while the host reads them.

        Only while no row has ended: the ids of ended rows are replaced.
        """
        self._ahead = None
        if self._sample_fn is not None and not bool(rows.ended.any()):
            self._ahead = self._model.sample_next(
                ids, self._cache, rows.attention_mask, self._sample_fn
            )

    def feed(self, rows: Rows) -> None:
        """Run the newest column of the rows, unless that has started already."""
        if self._ahead is not None:
            self._cache.advance(1)
        elif self._uses_cache:
            mask, column = rows.attention_mask, rows.input_ids[:, -1:]
            self._logits = self._model.next_logits(column, self._cache, mask, position_ids(mask, 1))
        else:
            whole = self._model.new_cache(*rows.input_ids.shape)
            self._logits = self._prefilled(rows.input_ids, rows, whole)

    def _prefilled(self, columns: Tensor, rows: Rows, cache: KVCache) -> Tensor:
        """Feed what `cache` does not hold yet of the columns, in chunks; the last logits (B, V)."""
        logits = torch.empty(0)
        for start in range(cache.length, columns.shape[1], self._chunk):
            stop = min(start + self._chunk, columns.shape[1])
            mask = None if rows.attention_mask is None else rows.attention_mask[:, :stop]
            chunk, positions = columns[:, start:stop], position_ids(mask, stop - start)
            if columns.dim() == 2:
                logits = self._model.next_logits(chunk, cache, mask, positions)
            else:
                logits = self._model.next_logits(None, cache, mask, positions, chunk)
        return logits


def _prepared(model: CausalLM, inputs: GenerationInputs) -> GenerationInputs:
    """The inputs, checked, with the padding on the left and with a cache."""
    inputs.check(model.config.hidden_size)
    prompt_length = inputs.columns.shape[1]
    budget, limit = inputs.config.new_tokens(prompt_length), model.config.max_position_embeddings
    if prompt_length + budget > limit:
        warnings.warn(
            f"{prompt_length} prompt and {budget} new tokens pass the {limit} positions that the "
            "model was made for; expect worse text beyond them",
            stacklevel=3,
        )
    inputs = _with_cache(model, inputs.left_padded())
    assert inputs.cache is not None
    inputs.cache.check_compatible(model.new_cache(len(inputs.columns), 0))
    if inputs.cache.length >= prompt_length:
        raise UsageError(
            "the cache holds the whole prompt already",
            where="past_key_values",
            expected=f"fewer than the prompt's {prompt_length} columns",
            found=inputs.cache.length,
            remedy="Pass the ids of the cached columns and at least one more.",
        )
    return inputs


def _with_cache(model: CausalLM, inputs: GenerationInputs) -> GenerationInputs:
    """The inputs; an empty cache has slots for the prompt and for what follows it at first."""
    if inputs.cache is not None:
        return inputs
    batch, prompt_length = inputs.columns.shape[:2]
    new_columns = min(inputs.config.new_tokens(prompt_length), _FIRST_NEW_COLUMNS)
    return replace(inputs, cache=model.new_cache(batch, prompt_length + new_columns))
