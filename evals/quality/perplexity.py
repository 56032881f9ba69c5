"""Perplexity of a text under a stated protocol, and the divergence from a reference model.

Shape letters: W windows, S window, V vocabulary. Knows nothing of printing.
"""

import codecs
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmix.errors import CheckpointError, QmixError, QualityError, UsageError
from qmix.evals.quality.layer_streaming import Scorer
from qmix.files import regular_file
from qmix.formats import Checkpoint, open_checkpoint
from qmix.kernels.backend import named
from qmix.models.options import parse_dtype
from qmix.text.tokenizer import LlamaTokenizer

WINDOW = 2048
_POSITIONS = 512  # compared at a time: 66 MB of float32 log-probabilities at V = 32000
_TEXT_BYTES = 1 << 30


@dataclass(frozen=True)
class Text:
    """A text and the SHA-256 of its UTF-8 bytes.

    Attributes:
        changes: what was changed of the file's text, in words.
    """

    content: str
    sha256: str
    changes: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: str, changes: tuple[str, ...] = ()) -> "Text":
        """The text with its SHA-256."""
        return cls(content, hashlib.sha256(content.encode()).hexdigest(), changes)


@dataclass(frozen=True, kw_only=True)
class ReferenceScore:
    """The reference model's perplexity, and KL(reference || model) in nats a token.

    Attributes:
        top1_agreement: the fraction of positions at which both predict the same token.
    """

    perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The perplexity of a text.

    Attributes:
        stderr: exp(mean loss) times the standard error of the mean. It takes the tokens as
            independent, which they are not quite, so read it as a lower bound.
        tokens: number of tokens that were predicted.
        protocol: how the text was cut into windows, in words.
    """

    perplexity: float
    stderr: float
    tokens: int
    protocol: str
    text_sha256: str
    reference: ReferenceScore | None

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON document of `qmix eval --json`."""
        document: dict[str, Any] = {
            "perplexity": self.perplexity,
            "perplexity_stderr": self.stderr,
            "tokens": self.tokens,
            "protocol": self.protocol,
            "text_sha256": self.text_sha256,
        }
        if self.reference is not None:
            document["reference"] = dict(vars(self.reference))
        return document

    def gate(self, *, max_perplexity: float | None, max_kl: float | None) -> QualityError | None:
        """The bound that is exceeded, if any; None is no bound."""
        kl = self.reference.kl_mean if self.reference is not None else None
        for name, value, bound in (
            ("perplexity", self.perplexity, max_perplexity),
            ("mean KL divergence", kl, max_kl),
        ):
            if bound is not None and value is not None and not value <= bound:
                return QualityError(
                    f"the {name} is too high", expected=f"at most {bound}", found=f"{value:.6f}"
                )
        return None


@dataclass(frozen=True, eq=False)
class ScoringWindows:
    """A tokenized text, cut into windows.

    Attributes:
        ids: (W, S).
        first: the first target position that is scored in a window; in the first window it is 1.
        protocol: how the text was cut, in words.
    """

    ids: Tensor
    first: int
    protocol: str


def scoring_windows(
    ids: list[int], window: int, stride: int, added: str = "BOS at the text's start only"
) -> ScoringWindows:
    """Cut windows of `window` ids every `stride`. Each target is scored once; the tail is dropped.

    With `stride == window` this is the protocol of the GPTQ papers: one BOS at the very start,
    non-overlapping windows, and the mean over the window - 1 shifted targets of each.

    Args:
        added: what the tokenizer put around the text, in words.

    Raises:
        UsageError: fewer than two ids.
    """
    if len(ids) < 2:
        raise UsageError("the text is too short to score", expected="2 tokens", found=len(ids))
    if len(ids) < window:
        words = f"one window of {len(ids)}, the whole text (shorter than {window}), {added}"
        return ScoringWindows(torch.tensor([ids]), 1, words)
    starts = range(0, len(ids) - window + 1, stride)
    dropped = len(ids) - (starts[-1] + window)
    kind = "non-overlapping" if stride == window else f"stride {stride}, each token scored once"
    words = f"{len(starts)} windows of {window}, {kind}, {added}, tail of {dropped} tokens dropped"
    rows = torch.tensor([ids[start : start + window] for start in starts])
    return ScoringWindows(rows, 1 if stride == window else window - stride, words)


def evaluate(
    directory: Path,
    text: Text,
    *,
    reference: Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Score a text with a checkpoint, and compare with a reference checkpoint.

    Args:
        reference: directory of the reference; None compares with nothing.
        window: tokens of a window; by default the model's positions, at most 2048.
        stride: tokens from one window to the next; by default the window.
        dtype, device: as `qmix.LoadOptions`.
        backend: the same; the reference takes the best that there is.
        progress: called with (layers done, layers in all).

    Raises:
        UsageError: window or stride is out of range, or the text is too short.
        CheckpointError: a checkpoint is damaged, or the two tokenize the text differently.
    """
    weight_dtype, asked = parse_dtype(dtype), named(backend)
    checkpoint = open_checkpoint(directory)
    tokenizer = LlamaTokenizer.from_pretrained(directory)
    ids = tokenizer.encode(text.content)
    positions = checkpoint.config.max_position_embeddings
    size = min(WINDOW, positions) if window is None else window
    _check_range("ctx", size, 2, positions)
    step = size if stride is None else stride
    _check_range("stride", step, 1, size)
    windows = scoring_windows(ids, size, step, added_tokens(tokenizer))
    base = None if reference is None else _comparable(reference, checkpoint, text, ids)
    base_layers = 0 if base is None else base.config.num_hidden_layers
    total = base_layers + checkpoint.config.num_hidden_layers

    def scorer(each: Checkpoint, before: int) -> Scorer:
        return Scorer(
            each,
            windows.ids,
            dtype=weight_dtype,
            device=device,
            backend=asked if each is checkpoint else None,
            progress=lambda done, _: progress(before + done, total),
        )

    compared = None if base is None else scorer(base, 0)
    return _score(windows, scorer(checkpoint, base_layers), compared, text.sha256)


def added_tokens(tokenizer: LlamaTokenizer) -> str:
    """What a tokenizer puts around a text, in words."""
    alone, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    at = next(n for n in range(len(whole)) if whole[n : n + len(alone)] == alone)
    before, after = whole[:at], whole[at + len(alone) :]
    words = "nothing in front"
    if before == [tokenizer.bos_token_id]:
        words = "BOS at the text's start only"
    elif before:
        words = f"{_named(tokenizer, before)} at the text's start only"
    return f"{words}, {_named(tokenizer, after)} at its end" if after else words


def _named(tokenizer: LlamaTokenizer, ids: list[int]) -> str:
    return " ".join(f"{tokenizer.convert_ids_to_tokens(index)} ({index})" for index in ids)


def _comparable(reference: Path, checkpoint: Checkpoint, text: Text, ids: list[int]) -> Checkpoint:
    """Open the reference, which must have the checkpoint's tokenizer and vocabulary."""
    if LlamaTokenizer.from_pretrained(reference).encode(text.content) != ids:
        raise CheckpointError(
            "the two checkpoints tokenize the text differently",
            where=str(reference),
            remedy="Give the checkpoint that the 4-bit one was made from.",
        )
    opened = open_checkpoint(reference)
    if opened.config.vocab_size != checkpoint.config.vocab_size:
        raise CheckpointError(
            "the two checkpoints have different vocabularies",
            where=str(reference),
            expected=checkpoint.config.vocab_size,
            found=opened.config.vocab_size,
        )
    return opened


def read_text(data: Path, *, as_it_is: bool = False) -> Text:
    """Read a text file, or a pipe that is being written.

    Args:
        as_it_is: keep the byte-order mark and the line ends CRLF that Windows writes; they cost
            tokens that no model saw in training.

    Raises:
        CheckpointError: not a file, unreadable, over 1 GiB, empty or not UTF-8.
    """
    raw = regular_file.read_given(data, limit_bytes=_TEXT_BYTES)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CheckpointError(
            "not UTF-8",
            where=str(data),
            found="UTF-16, as Windows writes it",
            remedy="Convert it: iconv -f UTF-16 -t UTF-8",
        )
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            "not UTF-8",
            where=str(data),
            found=f"byte {raw[error.start]:#04x} at offset {error.start}",
            remedy="Convert the text to UTF-8 first.",
        ) from None
    changes = []
    if not as_it_is and content.startswith("\ufeff"):
        content = content[1:]
        changes.append("a byte-order mark was dropped")
    if not as_it_is and (ends := content.count("\r\n")):
        content = content.replace("\r\n", "\n")
        changes.append(f"{ends} line ends CRLF became LF")
    if not content:
        raise CheckpointError("the text is empty", where=str(data))
    return Text.of(content, tuple(changes))


def _score(
    windows: ScoringWindows, scorer: Scorer, reference: Scorer | None, text_sha256: str
) -> Perplexity:
    losses, reference_losses, divergences, agreements = [], [], [], []
    for index, row in enumerate(windows.ids):
        first = 1 if index == 0 else windows.first
        for start in range(first, len(row), _POSITIONS):
            stop = min(start + _POSITIONS, len(row))
            targets = row[start:stop, None]
            predicted = scorer.log_probabilities(index, start - 1, stop - 1).cpu()
            losses.append(-predicted.gather(1, targets)[:, 0])
            if reference is None:
                continue
            expected = reference.log_probabilities(index, start - 1, stop - 1).cpu()
            reference_losses.append(-expected.gather(1, targets)[:, 0])
            divergences.append((expected.exp() * (expected - predicted)).sum(-1))
            agreements.append(expected.argmax(-1) == predicted.argmax(-1))
    perplexity, stderr = _perplexity(torch.cat(losses))
    compared = None
    if reference is not None:
        kl = torch.cat(divergences).double()
        compared = ReferenceScore(
            perplexity=_perplexity(torch.cat(reference_losses))[0],
            kl_mean=float(kl.mean()),
            kl_median=float(kl.median()),
            kl_p99=_quantile(kl, 0.99),
            top1_agreement=float(torch.cat(agreements).double().mean()),
        )
    return Perplexity(
        perplexity=perplexity,
        stderr=stderr,
        tokens=sum(len(chunk) for chunk in losses),
        protocol=windows.protocol,
        text_sha256=text_sha256,
        reference=compared,
    )


def _perplexity(losses: Tensor) -> tuple[float, float]:
    """exp of the mean loss, and its standard error."""
    losses = losses.double()
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise QmixError(
            "the model computed non-finite logits",
            remedy="The checkpoint is damaged or overflows in this dtype; try bfloat16.",
        )
    spread = float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    try:
        return math.exp(mean), math.exp(mean) * spread
    except OverflowError:
        raise QmixError("the perplexity overflows", found=f"a mean loss of {mean:.1f}") from None


def _quantile(values: Tensor, fraction: float) -> float:
    """The smallest value that `fraction` of all do not exceed (torch.quantile stops at 16 M)."""
    return float(values.kthvalue(max(1, math.ceil(fraction * len(values)))).values)


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError("out of range", where=name, expected=f"{low} to {high}", found=value)
