"""Perplexity of a text under a stated protocol, and the divergence from a reference model.

Knows nothing of printing.
"""

import codecs
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qmix.errors import CheckpointError, QmixError, QualityError
from qmix.evals.quality.layer_streaming import Scorer
from qmix.evals.quality.token_scores import TokenScores, token_scores
from qmix.evals.quality.windows import open_comparable, text_windows
from qmix.files import regular_file
from qmix.formats import Checkpoint, open_checkpoint
from qmix.kernels.backend import named
from qmix.models.options import parse_dtype
from qmix.quantities import counted
from qmix.text.tokenizer import LlamaTokenizer

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

    @classmethod
    def of(cls, scores: TokenScores, protocol: str, text_sha256: str) -> "Perplexity":
        """The perplexity of scored tokens, and what they say of the reference.

        Raises:
            QmixError: the model computed numbers that are not finite.
        """
        perplexity, stderr = _perplexity(scores.losses)
        compared = None
        if scores.divergences is not None:
            kl = scores.divergences.kl.double()
            compared = ReferenceScore(
                perplexity=_perplexity(scores.divergences.reference_losses)[0],
                kl_mean=float(kl.mean()),
                kl_median=float(kl.median()),
                kl_p99=_quantile(kl, 0.99),
                top1_agreement=float(scores.divergences.agreed.double().mean()),
            )
        return cls(
            perplexity=perplexity,
            stderr=stderr,
            tokens=len(scores.losses),
            protocol=protocol,
            text_sha256=text_sha256,
            reference=compared,
        )

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
    windows = text_windows(checkpoint, tokenizer, ids, window, stride)
    base = None if reference is None else open_comparable(reference, checkpoint, text.content, ids)
    base_layers = 0 if base is None else base.config.num_hidden_layers
    total = base_layers + checkpoint.config.num_hidden_layers

    def scored(each: Checkpoint, before: int) -> Scorer:
        own = asked if each is checkpoint else None
        scorer = Scorer(each, windows.ids, dtype=weight_dtype, device=device, backend=own)
        scorer.run(lambda done, _: progress(before + done, total))
        return scorer

    compared = None if base is None else scored(base, 0)
    scores = token_scores(windows, scored(checkpoint, base_layers), compared)
    return Perplexity.of(scores, windows.protocol, text.sha256)


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
        changes.append(f"{counted(ends, 'line end')} CRLF became LF")
    if not content:
        raise CheckpointError("the text is empty", where=str(data))
    return Text.of(content, tuple(changes))


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
