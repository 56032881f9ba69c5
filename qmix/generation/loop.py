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
from qmix.errors import UsageError, of_device
from qmix.generation.config import GenerationConfig
from qmix.generation.draft_counts import DraftCounts
from qmix.generation.drafted_text import Drafter
from qmix.generation.host_copy import to_device
from qmix.generation.inputs import GenerationInputs
from qmix.generation.padding import position_ids
from qmix.generation.rows import Rows
from qmix.generation.sampling import checked
from qmix.generation.speculation import Speculation
from qmix.generation.streamers import Streamer
from qmix.generation.token_selector import SampledStep, SampleFn, TokenSelector
from qmix.nn.cache import Cache, KVCache
from qmix.nn.embedding import check_ids
from qmix.nn.outputs import GenerateDecoderOnlyOutput
from qmix.planning.budget import GPU_PREFILL_CHUNK, PREFILL_CHUNK

# Columns that a cache has slots for at first beyond the prompt; it grows where more follow. On a
# GPU a conversation's cache has a multiple of these: each growth costs a recording.
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
        cache: Cache,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor: ...
    def sample_next(
        self, ids: Tensor, cache: KVCache, attention_mask: Tensor | None, sample_fn: SampleFn
    ) -> SampledStep | None: ...
    def generator(self, cache: KVCache, seed: int) -> torch.Generator: ...
    def exact_rows(self) -> int: ...


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
        drafts: what drafts have done so far; None: nothing is drafted.
    """

    ids: Tensor
    texts: tuple[str, ...]
    elapsed_s: float
    finish: Finish | None
    logits: Tensor
    scores: Tensor
    drafts: DraftCounts | None = None


def stream(model: CausalLM, inputs: GenerationInputs) -> Iterator[Token]:
    """Generate after a prompt, one Token a step.

    Raises:
        UsageError: as GenerationInputs.check; a cache of another model or of the whole prompt; an
            id outside the vocabulary.
        ResourceError: the GPU failed in the middle.
    """
    try:
        yield from _tokens(model, inputs)
    except RuntimeError as error:
        failure = of_device(error)
        if failure is None:
            raise
        raise failure from error


def _tokens(model: CausalLM, inputs: GenerationInputs) -> Iterator[Token]:
    start = time.perf_counter()
    inputs = _prepared(model, inputs)
    rows, steps = Rows(inputs, model.device), _Steps(model, inputs)
    budget = inputs.config.new_tokens(inputs.columns.shape[1])
    try:
        steps.prefill(inputs.columns, rows)
        for index in range(budget):
            last = index + 1 == budget
            chosen = steps.chosen(rows, index)
            if not last:
                steps.run_ahead(chosen, rows)
            new = checked(chosen.ids_on_host.wait())
            ids, texts = rows.append(new, chosen.scores, last=last)
            finish: Finish | None = "stop" if bool(rows.ended.all()) else "length" if last else None
            elapsed_s = time.perf_counter() - start
            yield Token(ids, texts, elapsed_s, finish, chosen.logits, chosen.scores, steps.drafts)
            if finish is not None:
                return
            steps.feed(rows, left=budget - index - 1)
    finally:
        steps.drop()


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
    new_ids: list[Tensor] = []  # on the CPU: copying one to a device would wait for its step
    scores: list[Tensor] = []
    logits: list[Tensor] = []
    with _ended(streamer):
        if streamer is not None:
            streamer.put(prompt_ids.cpu())
        for token in stream(model, inputs):
            new_ids.append(token.ids)
            if config.output_scores:
                scores.append(token.scores)
            if config.output_logits:
                logits.append(token.logits)
            if streamer is not None:
                streamer.put(token.ids)
    sequences = torch.cat((prompt_ids.to(device), torch.stack(new_ids, 1).to(device)), 1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
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
    """The model's side of a generation: from the ids so far to the next ones.

    Where a step can choose its ids on the device, the next step is enqueued before they are read,
    and reads them there. So one step more than needed may run, whose position the cache never
    counts.
    """

    def __init__(self, model: CausalLM, inputs: GenerationInputs) -> None:
        """`inputs` must have a cache."""
        config = inputs.config
        assert inputs.cache is not None
        self._model = model
        self._cache = inputs.cache
        self._uses_cache = config.use_cache
        seed = seed_for(config, model.device)
        generator = None if seed is None else model.generator(self._cache, seed)
        self._selector = TokenSelector(config, inputs.logits_processor, generator)
        self._speculation = _speculation(model, inputs)
        plain = config.use_cache and self._speculation is None
        self._sample_fn = self._selector.sample_fn if plain else None
        default = GPU_PREFILL_CHUNK if model.device.type == "cuda" else PREFILL_CHUNK
        self._chunk = config.prefill_chunk_size or default
        self._logits = torch.empty(0)  # of the next step, unless `_step` is set
        self._step: SampledStep | None = None  # enqueued, its ids come next
        self._ahead: SampledStep | None = None  # the one after it

    @property
    def drafts(self) -> DraftCounts | None:
        """What drafts have done; None: nothing is drafted."""
        return None if self._speculation is None else self._speculation.counts

    def prefill(self, columns: Tensor, rows: Rows) -> None:
        """Feed the columns of the prompt that the cache does not hold yet."""
        self._logits = self._prefilled(columns.to(self._model.device), rows, self._cache)

    def chosen(self, rows: Rows, step: int) -> SampledStep:
        """The step that gives the next ids; `step` new tokens came before them."""
        if self._step is not None:
            return self._step
        return self._selector.select(self._logits, rows.input_ids, rows.ids_mask, step)

    def run_ahead(self, chosen: SampledStep, rows: Rows) -> None:
        """Enqueue the step after `chosen`, whose ids nobody has read yet.

        Not after ids that were chosen on the host: the first of a reply should not wait for a
        recording.
        """
        if chosen is self._step:
            self._ahead = self._sampled(rows.fed(chosen.ids), rows)

    def feed(self, rows: Rows, left: int) -> None:
        """Run the newest column of the rows, unless that has started already.

        Args:
            left: how many ids a row may still get.
        """
        self._step, self._ahead = self._ahead, None
        if self._step is None and self._sample_fn is not None:
            self._step = self._sampled(to_device(rows.newest[:, 0], self._model.device), rows)
        if self._step is not None:
            self._cache.advance(1)
        elif self._speculation is not None:
            self._logits = self._speculation.next_logits(rows.newest, left)
        elif self._uses_cache:
            mask, column = rows.attention_mask, rows.newest.to(self._model.device)
            self._logits = self._model.next_logits(column, self._cache, mask, position_ids(mask, 1))
        else:
            whole = self._model.new_cache(*rows.input_ids.shape)
            self._logits = self._prefilled(rows.input_ids, rows, whole)

    def drop(self) -> None:
        """Leave the cache as its ids say.

        Waits for a step that was enqueued in vain: it writes into the cache, on this stream.
        """
        if self._speculation is not None:
            self._speculation.drop()
        if self._ahead is not None:
            self._ahead.ids_on_host.wait()
            self._ahead = None

    def _sampled(self, ids: Tensor, rows: Rows) -> SampledStep | None:
        if self._sample_fn is None:
            return None
        return self._model.sample_next(ids, self._cache, rows.attention_mask, self._sample_fn)

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


def _speculation(model: CausalLM, inputs: GenerationInputs) -> Speculation | None:
    """What drafts the ids of a generation; None where nothing is to be drafted.

    Only as many ids as keep the text what it is without drafts, if the model has such passes.
    """
    config, cache, mask = inputs.config, inputs.cache, inputs.attention_mask
    most = config.prompt_lookup_num_tokens
    assert cache is not None
    if most is None or not config.use_cache or cache.batch > 1:
        return None
    if mask is not None and not bool(mask.all()):
        return None
    exact = model.exact_rows()
    drafter = inputs.drafter or Drafter()
    drafter.lookup.begin(inputs.prompt_ids[0].tolist())
    return Speculation(model, cache, drafter, most=min(most, exact - 1) if exact > 1 else most)


def seed_for(config: GenerationConfig, device: torch.device) -> int | None:
    """The seed of a generator for one reply; None: there is none, or torch's global one is taken.

    A step that is recorded on a GPU must not draw from a generator that other code uses. Where the
    caller gives no seed, the global one gives it.
    """
    if config.seed is not None or device.type != "cuda" or config.sampling.greedy:
        return config.seed
    return int(torch.randint(2**63 - 1, ()))


def _prepared(model: CausalLM, inputs: GenerationInputs) -> GenerationInputs:
    """The inputs, checked, with the padding on the left and with a cache."""
    inputs.check(model.config.hidden_size)
    if inputs.columns.dim() == 2:  # ids; a step with static shapes looks at none
        check_ids(inputs.columns, model.config.vocab_size)
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
    if model.device.type == "cuda":
        inputs.cache.reserve(columns_to_reserve(prompt_length, budget))
    if inputs.cache.length >= prompt_length:
        raise UsageError(
            "the cache holds the whole prompt already",
            where="past_key_values",
            expected=f"fewer than the prompt's {prompt_length} columns",
            found=inputs.cache.length,
            remedy="Pass the ids of the cached columns and at least one more.",
        )
    return inputs


def columns_to_reserve(prompt: int, new: int) -> int:
    """Columns that a reply's cache has slots for from the start, with few growths over many."""
    wanted = prompt + min(new, _FIRST_NEW_COLUMNS)
    return min(-(-wanted // _FIRST_NEW_COLUMNS) * _FIRST_NEW_COLUMNS, prompt + new)


def _with_cache(model: CausalLM, inputs: GenerationInputs) -> GenerationInputs:
    """The inputs; an empty cache has slots for the prompt and for what follows it at first."""
    if inputs.cache is not None:
        return inputs
    batch, prompt_length = inputs.columns.shape[:2]
    new_columns = min(inputs.config.new_tokens(prompt_length), _FIRST_NEW_COLUMNS)
    return replace(inputs, cache=model.new_cache(batch, prompt_length + new_columns))
