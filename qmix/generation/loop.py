"""The generation loop: prefill in chunks, decode token by token, stop.

Shape letters: B rows, P prompt columns, L columns so far, D hidden width, V vocabulary.
Knows the model only by its `next_logits`, and text only for stop strings.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.generation.config import MAX_NEW_TOKENS, GenerationConfig
from qmix.generation.logits_processors import LogitsProcessor
from qmix.generation.padding import (
    check_embedded,
    check_prompt,
    left_padded,
    mask_given,
    or_none,
    positions,
)
from qmix.generation.sampling import checked
from qmix.generation.stopping import RowText, StoppingCriterion, met
from qmix.generation.streamers import Streamer
from qmix.generation.token_choice import SampleFn, TokenSelector
from qmix.nn.cache import KVCache
from qmix.nn.outputs import GenerateDecoderOnlyOutput
from qmix.text.detokenizer import StreamDetokenizer
from qmix.text.tokenizer import LlamaTokenizer

__all__ = [
    "MAX_NEW_TOKENS",
    "CausalLM",
    "Finish",
    "GenerationConfig",
    "SampledStep",
    "Streamer",
    "Token",
    "generate",
    "stream",
]

# Bounds the attention mask (chunk x context) and the activations of a long prompt.
PREFILL_CHUNK = 512
# On a GPU a chunk reads all experts, whatever its length: 24 GB for the 8x7B.
GPU_PREFILL_CHUNK = 4096

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
        positions: Tensor | None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor: ...
    def sample_next(
        self, ids: Tensor, cache: KVCache, attention_mask: Tensor | None, sample_fn: SampleFn
    ) -> "SampledStep | None": ...


@dataclass(frozen=True, eq=False)
class SampledStep:
    """What a step on the device chose, as it will be there: logits, scores (B, V) and ids (B,)."""

    logits: Tensor
    scores: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Token:
    """One decode step.

    Attributes:
        ids: the new id of each row (B,), on the CPU; pad_id for rows that have ended.
        texts: what each row's token adds to its text, whole characters only; empty without a
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


def stream(
    model: CausalLM,
    input_ids: Tensor | None,
    config: GenerationConfig,
    *,
    attention_mask: Tensor | None = None,
    cache: KVCache | None = None,
    tokenizer: LlamaTokenizer | None = None,
    answers: bool = False,
    inputs_embeds: Tensor | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
) -> Iterator[Token]:
    """Generate after `input_ids` (B, P), one Token a step.

    Args:
        attention_mask: bool (B, P), False at padding, on whichever side.
        cache: holds the first `cache.length < P` columns already; the rest is prefilled into it.
            After a step the cache holds all columns but the newest.
        tokenizer: gives the tokens' texts, and is needed for stop strings.
        answers: the text starts anew (a chat's reply) instead of going on with the prompt's, which
            keeps a leading space.
        inputs_embeds: (B, P, D) instead of ids. Processors, criteria and texts then know the new
            ids only.
        logits_processor, stopping_criteria: see MixtralForCausalLM.generate.
    """
    begun = time.perf_counter()
    columns = _columns(model, input_ids, inputs_embeds, attention_mask, config)
    batch, prompt_length = columns.shape[:2]
    if config.stops and tokenizer is None:
        raise UsageError(
            "stop strings need a tokenizer",
            where="stop_strings",
            remedy="Pass tokenizer=, or load the model with qmix.load.",
        )
    budget = config.new_tokens(prompt_length)
    limit = model.config.max_position_embeddings
    if prompt_length + budget > limit:
        warnings.warn(
            f"{prompt_length} prompt and {budget} new tokens pass the {limit} positions that the "
            "model was made for; expect worse text beyond them",
            stacklevel=2,
        )
    if attention_mask is not None:
        given = attention_mask
        columns, attention_mask = left_padded(columns, attention_mask)
        if cache is not None and cache.length and not torch.equal(given, attention_mask):
            raise UsageError("a cache goes with padding on the left only", where="attention_mask")
    device = model.device
    generator = None
    if config.seed is not None:
        generator = torch.Generator(device).manual_seed(config.seed)
    capacity = min(prompt_length + budget, prompt_length + 1024)
    if cache is None:
        cache = model.new_cache(batch, capacity)
    cache.check(model.new_cache(batch, 0))
    if cache.length >= prompt_length:
        raise UsageError(
            "the cache holds the whole prompt already",
            where="past_key_values",
            expected=f"fewer than the prompt's {prompt_length} columns",
            found=cache.length,
            remedy="Pass the ids of the cached columns and at least one more.",
        )
    known = columns if inputs_embeds is None else torch.empty(batch, 0, dtype=torch.long)
    rows: list[RowText] = []
    if tokenizer is not None:
        prompts = [[]] * batch if answers else known.tolist()
        rows = [
            RowText(StreamDetokenizer(tokenizer, prompt=ids), config.eos_ids, config.stops)
            for ids in prompts
        ]
    columns, context, attention_mask = (
        columns.to(device),
        known.to(device),
        or_none(attention_mask, device),
    )
    select = TokenSelector(config, logits_processor, generator)
    eos = torch.tensor(config.eos_ids, dtype=torch.long)
    default = GPU_PREFILL_CHUNK if device.type == "cuda" else PREFILL_CHUNK
    chunk = config.prefill_chunk_size or default
    logits = _prefill(model, columns, attention_mask, cache, chunk)
    finished = torch.zeros(batch, dtype=torch.bool)
    sample_fn = select.sample_fn if config.use_cache else None
    sampled: SampledStep | None = None
    for index in range(budget):
        if sampled is None:
            seen = (
                None
                if attention_mask is None
                else attention_mask[:, attention_mask.shape[1] - context.shape[1] :]
            )
            scores = select.scores(logits, context, seen, index)
            ids = select(scores).cpu()
        else:
            logits, scores, ids = sampled.logits, sampled.scores, checked(sampled.ids.cpu())
        sampled = None
        if sample_fn is not None and index + 1 < budget and not bool(finished.any()):
            sampled = model.sample_next(
                ids, cache, attention_mask, sample_fn
            )  # runs while the host reads this one
        ids = torch.where(finished, config.pad_id, ids)
        finished = finished | torch.isin(ids, eos)
        column = ids.to(device)[:, None]
        context = torch.cat((context, column), 1)
        for criterion in stopping_criteria:
            finished = finished | met(criterion, context, scores)
        last = index + 1 == budget
        texts = tuple(
            row.put(int(token), last=last or bool(ended))
            for row, token, ended in zip(rows, ids, finished, strict=False)
        )
        if rows:
            finished = finished | torch.tensor([row.ended for row in rows])
        finish: Finish | None = "stop" if bool(finished.all()) else "length" if last else None
        yield Token(ids, texts, time.perf_counter() - begun, finish, logits, scores)
        if finish is not None:
            return
        if attention_mask is not None:
            attention_mask = torch.cat(
                (attention_mask, torch.ones_like(column, dtype=torch.bool)), 1
            )
        if sampled is not None:
            cache.advance(1)
        elif config.use_cache:
            logits = model.next_logits(column, cache, attention_mask, positions(attention_mask, 1))
        else:
            whole = model.new_cache(batch, context.shape[1])
            logits = _prefill(model, context, attention_mask, whole, chunk)


def generate(
    model: CausalLM,
    input_ids: Tensor | None,
    config: GenerationConfig,
    *,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    cache: KVCache | None = None,
    tokenizer: LlamaTokenizer | None = None,
    streamer: Streamer | None = None,
    logits_processor: Sequence[LogitsProcessor] = (),
    stopping_criteria: Sequence[StoppingCriterion] = (),
) -> Tensor | GenerateDecoderOnlyOutput:
    """Prompt and new ids, (B, P + N) on the prompt's device; padding stays where it was."""
    attention_mask = None if attention_mask is None else mask_given(attention_mask).bool()
    columns = _columns(model, input_ids, inputs_embeds, attention_mask, config)
    copies = config.num_return_sequences
    if copies > 1:
        columns = columns.repeat_interleave(copies, 0)
        attention_mask = (
            None if attention_mask is None else attention_mask.repeat_interleave(copies, 0)
        )
    batch, device = columns.shape[0], columns.device
    if streamer is not None and batch != 1:
        raise UsageError("a streamer takes one row", where="input_ids", found=f"{batch} rows")
    if cache is None:
        budget = config.new_tokens(columns.shape[1])
        cache = model.new_cache(batch, min(budget, 1024) + columns.shape[1])
    prompt = columns if inputs_embeds is None else torch.empty(batch, 0, dtype=torch.long)
    found = [prompt.to(device)]
    scores: list[Tensor] = []
    logits: list[Tensor] = []
    tokens = stream(
        model,
        columns if inputs_embeds is None else None,
        config,
        attention_mask=attention_mask,
        cache=cache,
        tokenizer=tokenizer,
        inputs_embeds=None if inputs_embeds is None else columns,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
    )
    with _ended(streamer):
        if streamer is not None:
            streamer.put(prompt.cpu())
        for token in tokens:
            found.append(token.ids[:, None].to(device))
            if config.output_scores:
                scores.append(token.scores)
            if config.output_logits:
                logits.append(token.logits)
            if streamer is not None:
                streamer.put(token.ids)
    sequences = torch.cat(found, 1)
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=tuple(scores) or None,
        logits=tuple(logits) or None,
        past_key_values=cache if config.use_cache else None,
    )


@contextmanager
def _ended(streamer: Streamer | None) -> Iterator[None]:
    """Tell a streamer of the end, after a failure too: another thread may wait for it."""
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def _columns(
    model: CausalLM,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    config: GenerationConfig,
) -> Tensor:
    """The prompt, ids (B, P) or embeddings (B, P, D), checked."""
    if inputs_embeds is None:
        check_prompt(input_ids, attention_mask)
        assert input_ids is not None
        return input_ids
    if input_ids is not None:
        raise UsageError("give input_ids or inputs_embeds, and not both")
    check_embedded(inputs_embeds, attention_mask, model.config.hidden_size)
    if not config.use_cache:
        raise UsageError("embeddings are generated from with a cache only", where="use_cache")
    return inputs_embeds


def _prefill(
    model: CausalLM, columns: Tensor, attention_mask: Tensor | None, cache: KVCache, chunk: int
) -> Tensor:
    """Feed the columns that the cache does not hold yet, in chunks; logits of the last (B, V)."""
    logits = torch.empty(0)
    for start in range(cache.length, columns.shape[1], chunk):
        stop = min(start + chunk, columns.shape[1])
        seen = attention_mask[:, :stop] if attention_mask is not None else None
        piece, places = columns[:, start:stop], positions(seen, stop - start)
        if columns.dim() == 2:
            logits = model.next_logits(piece, cache, seen, places)
        else:
            logits = model.next_logits(None, cache, seen, places, piece)
    return logits
