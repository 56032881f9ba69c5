"""The generation loop: prefill in chunks, decode token by token, stop.

Shape letters: B rows, P prompt columns, L columns so far, V vocabulary.
Knows the model only by its `next_logits`, and text only for stop strings.
"""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qmix import strict_json
from qmix.cache import KVCache
from qmix.config import MixtralConfig
from qmix.detokenizer import StreamDetokenizer
from qmix.errors import CheckpointError, UsageError
from qmix.sampling import Sampling
from qmix.tokenizer import LlamaTokenizer

# Bounds the attention mask (chunk x context) and the activations of a long prompt.
PREFILL_CHUNK = 512
MAX_NEW_TOKENS = 1 << 24

Finish = Literal["stop", "length"]


class CausalLM(Protocol):
    """What the loop asks of a model."""

    @property
    def config(self) -> MixtralConfig: ...
    @property
    def device(self) -> torch.device: ...
    def new_cache(self, batch: int, capacity: int) -> KVCache: ...
    def next_logits(
        self, input_ids: Tensor, cache: KVCache, keep: Tensor | None, positions: Tensor | None
    ) -> Tensor: ...


class Streamer(Protocol):
    """Hugging Face's streamer protocol: the prompt (1, P) first, then each new id (1,), then end."""

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """When to stop and how to choose; the names are Hugging Face's, and `seed` is ours.

    Attributes:
        max_new_tokens: new tokens at most; None: see max_length.
        max_length: prompt and new tokens together; without either limit 20 new tokens.
        min_new_tokens: end-of-sequence ids are excluded before this many new tokens.
        do_sample: False is greedy; True draws, with top_k 50 unless given (Hugging Face's default).
        seed: of the draw; None takes torch's global generator.
        stop_strings: generation of a row ends once its new text holds one of these; the ids keep it,
            a stream of text leaves it out.
        eos_token_id: ids that end a row; None: none.
        pad_token_id: fills rows that ended before others; default: the first eos id, else 0.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_strings: str | Sequence[str] | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("max_length", 1), ("min_new_tokens", 0)):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not least <= value <= MAX_NEW_TOKENS
            ):
                raise UsageError(
                    "out of range",
                    where=name,
                    expected=f"{least} to {MAX_NEW_TOKENS}",
                    found=repr(value),
                )
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 1 << 64):
            raise UsageError(
                "out of range", where="seed", expected="0 to 2^64 - 1", found=repr(self.seed)
            )
        stops = self.stop_strings
        if not (stops is None or isinstance(stops, (str, list, tuple))) or not all(
            isinstance(stop, str) and stop for stop in self.stops
        ):
            raise UsageError(
                "wrong value",
                where="stop_strings",
                expected="a text or several, none of them empty",
                found=repr(stops)[:80],
            )
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, (list, tuple))
            if any(type(index) is not int for index in (value if several else [value or 0])):
                raise UsageError(
                    "wrong type", where=name, expected="a token id", found=repr(value)[:80]
                )
        _ = self._drawing  # checked also where greedy choice does not need it

    @property
    def sampling(self) -> Sampling:
        if not self.do_sample:
            return Sampling(repetition_penalty=self.repetition_penalty)
        return self._drawing

    @property
    def _drawing(self) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k or 0,
            top_p=self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop_strings is None:
            return ()
        return (self.stop_strings,) if isinstance(self.stop_strings, str) else (*self.stop_strings,)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else (*self.eos_token_id,)

    @property
    def pad_id(self) -> int:
        if self.pad_token_id is not None and self.pad_token_id >= 0:
            return self.pad_token_id
        return self.eos_ids[0] if self.eos_ids else 0

    @classmethod
    def of(cls, config: MixtralConfig, directory: Path | None = None) -> "GenerationConfig":
        """The checkpoint's own: special ids of generation_config.json, else of config.json.

        Other entries of the file are not taken: how to sample is the user's choice.
        """
        own = cls(
            eos_token_id=config.eos_token_ids or None,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
        )
        path = directory / "generation_config.json" if directory is not None else None
        if path is None or not path.is_file():
            return own
        document = strict_json.read(path)
        names = ("eos_token_id", "pad_token_id", "bos_token_id")
        try:
            return own.updated({n: document[n] for n in names if document.get(n) is not None})
        except UsageError as error:
            raise CheckpointError(
                error.what,
                where=f"{path}: {error.where}",
                expected=error.expected,
                found=error.found,
            ) from None

    def updated(self, changes: Mapping[str, Any]) -> "GenerationConfig":
        """A copy with changes; an unknown name is refused."""
        known = {f.name for f in fields(self)}
        for name in changes:
            if name not in known:
                raise UsageError(
                    f"generate has no option {name!r}", expected=", ".join(sorted(known))
                )
        return replace(self, **changes)

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens may follow a prompt of this many columns."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return 20
        if self.max_length <= prompt_length:
            raise UsageError(
                "the prompt leaves no room for new tokens",
                where="max_length",
                expected=f"more than the prompt's {prompt_length} tokens",
                found=self.max_length,
            )
        return self.max_length - prompt_length


@dataclass(frozen=True, eq=False)
class Token:
    """One decode step.

    Attributes:
        ids: the new id of each row (B,), on the CPU; pad_id for rows that have ended.
        texts: what each row's token adds to its text, whole characters only; empty without a
            tokenizer.
        elapsed_s: seconds since generation began.
        finish: on the last step: `stop` if every row ended by itself, else `length`.
    """

    ids: Tensor
    texts: tuple[str, ...]
    elapsed_s: float
    finish: Finish | None


def stream(
    model: CausalLM,
    input_ids: Tensor,
    config: GenerationConfig,
    *,
    keep: Tensor | None = None,
    cache: KVCache | None = None,
    tokenizer: LlamaTokenizer | None = None,
    answers: bool = False,
) -> Iterator[Token]:
    """Generate after `input_ids` (B, P), one Token a step.

    Args:
        keep: bool (B, P), False at padding, on whichever side.
        cache: holds the first `cache.length < P` columns already; the rest is prefilled into it.
            After a step the cache holds all columns but the newest.
        tokenizer: gives the tokens' texts, and is needed for stop strings.
        answers: the text starts anew (a chat's reply) instead of going on with the prompt's, which
            keeps a leading space.
    """
    begun = time.perf_counter()
    check_prompt(input_ids, keep)
    batch, prompt_length = input_ids.shape
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
    if keep is not None:
        input_ids, keep = _left_padded(input_ids, keep)
    device = model.device
    sampling, eos = config.sampling, torch.tensor(config.eos_ids, dtype=torch.long)
    generator = None
    if config.seed is not None:
        generator = torch.Generator(device).manual_seed(config.seed)
    if cache is None:
        cache = model.new_cache(batch, min(prompt_length + budget, prompt_length + 1024))
    assert cache.length < prompt_length, "the newest column must still be computed"
    rows: list[_Row] = []
    if tokenizer is not None:
        prompts = [[]] * batch if answers else input_ids.tolist()
        rows = [_Row(config, StreamDetokenizer(tokenizer, prompt=ids)) for ids in prompts]

    context = input_ids.to(device)
    keep = _or_none(keep, device)
    logits = _prefill(model, context, keep, cache)
    finished = torch.zeros(batch, dtype=torch.bool)
    for index in range(budget):
        if index < config.min_new_tokens and len(eos):
            known = eos[(eos >= 0) & (eos < logits.shape[-1])].to(device)
            logits = logits.index_fill(-1, known, float("-inf"))
        scores = sampling.scores(logits, context, keep)
        ids = sampling.choose(scores, generator).cpu()
        ids = torch.where(finished, config.pad_id, ids)
        finished = finished | torch.isin(ids, eos)
        last = index + 1 == budget
        texts = tuple(row.put(int(token), last=last) for row, token in zip(rows, ids, strict=False))
        if rows:
            finished = finished | torch.tensor([row.ended for row in rows])
        finish: Finish | None = "stop" if bool(finished.all()) else "length" if last else None
        yield Token(ids, texts, time.perf_counter() - begun, finish)
        if finish is not None:
            return
        column = ids.to(device)[:, None]
        context = torch.cat((context, column), 1)
        if keep is not None:
            keep = torch.cat((keep, torch.ones_like(column, dtype=torch.bool)), 1)
        logits = model.next_logits(column, cache, keep, _positions(keep, 1))


def generate(
    model: CausalLM,
    input_ids: Tensor,
    config: GenerationConfig,
    *,
    attention_mask: Tensor | None = None,
    tokenizer: LlamaTokenizer | None = None,
    streamer: Streamer | None = None,
) -> Tensor:
    """Prompt and new ids, (B, P + N) on the prompt's device; padding stays where it was."""
    keep = None if attention_mask is None else attention_mask.bool()
    check_prompt(input_ids, keep)
    if streamer is not None:
        if input_ids.shape[0] != 1:
            raise UsageError(
                "a streamer takes one row", where="input_ids", found=f"{input_ids.shape[0]} rows"
            )
        streamer.put(input_ids.cpu())
    columns = [input_ids]
    for token in stream(model, input_ids, config, keep=keep, tokenizer=tokenizer):
        columns.append(token.ids[:, None].to(input_ids.device))
        if streamer is not None:
            streamer.put(token.ids)
    if streamer is not None:
        streamer.end()
    return torch.cat(columns, 1)


class _Row:
    """The new text of one row: taken apart from its tokens, ended and trimmed at stop strings."""

    def __init__(self, config: GenerationConfig, words: StreamDetokenizer) -> None:
        self.ended = False
        self._eos = config.eos_ids
        self._stops = config.stops
        self._held = ""  # may yet become a stop string
        self._words = words

    def put(self, token: int, *, last: bool) -> str:
        """The text that the token settles; nothing once the row has ended."""
        if self.ended:
            return ""
        text = self._held + self._words.put(token)
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.ended = True
            return text[: min(found)]
        self.ended = token in self._eos
        if self.ended or last:
            return text + self._words.end()
        settled = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[settled:]
        return text[:settled]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _prefill(model: CausalLM, ids: Tensor, keep: Tensor | None, cache: KVCache) -> Tensor:
    """Feed the columns that the cache does not hold yet, in chunks; logits of the last (B, V)."""
    logits = torch.empty(0)
    for start in range(cache.length, ids.shape[1], PREFILL_CHUNK):
        stop = min(start + PREFILL_CHUNK, ids.shape[1])
        seen = keep[:, :stop] if keep is not None else None
        logits = model.next_logits(ids[:, start:stop], cache, seen, _positions(seen, stop - start))
    return logits


def _positions(keep: Tensor | None, new: int) -> Tensor | None:
    """Positions of the last `new` columns, padding not counted; None without padding."""
    if keep is None:
        return None
    return (keep.long().cumsum(-1) - 1).clamp_min(0)[:, -new:]


def check_prompt(input_ids: Tensor, keep: Tensor | None) -> None:
    """Refuse what is no prompt.

    Raises:
        UsageError: not integers of shape (B, P), no token, or a mask of another shape.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not _is_integer(input_ids):
        found = (
            f"{input_ids.dtype} {list(input_ids.shape)}".removeprefix("torch.")
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        raise UsageError(
            "not a batch of token ids",
            where="input_ids",
            expected="an integer tensor [batch, sequence]",
            found=found,
        )
    if not input_ids.numel():
        raise UsageError("the prompt is empty", where="input_ids", expected="at least one token")
    if keep is None:
        return
    if keep.shape != input_ids.shape:
        raise UsageError(
            "wrong shape",
            where="attention_mask",
            expected=list(input_ids.shape),
            found=list(keep.shape),
        )
    if not bool(keep.any(-1).all()):
        raise UsageError("a row is all padding", where="attention_mask")


def _is_integer(ids: Tensor) -> bool:
    return ids.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _left_padded(ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows with all padding moved to the left, where new tokens can follow on the right."""
    order = keep.to(torch.uint8).sort(dim=-1, stable=True).indices.to(ids.device)
    return ids.gather(1, order), keep.gather(1, order.to(keep.device))


def _or_none(keep: Tensor | None, device: torch.device) -> Tensor | None:
    """All-ones masks are dropped, so that the unmasked, faster attention serves them."""
    if keep is None or bool(keep.all()):
        return None
    return keep.to(device)
