"""Quantized checkpoints scored against their 16-bit source, and the tables of their scores.

Knows nothing of how a checkpoint was quantized.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qmix.errors import CheckpointError
from qmix.evals import markdown
from qmix.evals.quality.bootstrap import Estimate
from qmix.evals.quality.evaluation import Material, WholeText, score_all
from qmix.evals.quality.perplexity import Perplexity, ReferenceScore
from qmix.evals.quality.texts import Text
from qmix.evals.quality.window_scores import difference
from qmix.evals.quality.windows import ScoringWindows, whole_windows
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.layouts import gguf_schemes
from qmix.formats.readers.storage import storage_summary
from qmix.gguf.tensor_types import BY_NAME
from qmix.quantize.calibrated.windows import Calibration
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights.scheme import Scheme

SCORE_COLUMNS = ("model", "bits/weight", "perplexity", "mean KL", "p99 KL", "top-1 agreement")


@dataclass(frozen=True, kw_only=True)
class VariantScore:
    """A quantized checkpoint against its 16-bit source.

    Attributes:
        bits_per_weight: of the quantized weights in the file: codes, scales, zeros or biases.
        schemes: number of weights in each scheme, or type of GGUF's.
        group_size: of all of them; None if they differ, or are in blocks.
        rival: whether another project's quantizer wrote the checkpoint.
        on_calibration: the score on the text that quantizers were calibrated with, if asked for.
    """

    name: str
    bits_per_weight: float
    schemes: dict[str, int]
    group_size: int | None
    rival: bool
    result: Perplexity
    on_calibration: Perplexity | None = None

    @property
    def calibration_kl(self) -> float | None:
        """Mean KL on the calibration text, where a method that fits it too closely is too good."""
        if self.on_calibration is None or self.on_calibration.reference is None:
            return None
        return self.on_calibration.reference.kl_mean

    @property
    def reference(self) -> ReferenceScore:
        """The comparison with the source."""
        assert self.result.reference is not None
        return self.result.reference

    @property
    def kl(self) -> float:
        """Mean KL(source || checkpoint) in nats a token."""
        return self.reference.kl_mean

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        return (
            self.name,
            f"{self.bits_per_weight:.3f}",
            f"{self.result.perplexity:.4f}",
            f"{self.reference.kl_mean:.5f}",
            f"{self.reference.kl_p99:.4f}",
            f"{100 * self.reference.top1_agreement:.2f} %",
        )

    def to_dict(self) -> dict[str, Any]:
        """The score as a JSON document."""
        return {
            "name": self.name,
            "rival": self.rival,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "schemes": self.schemes,
            **asdict(self.reference),
            "perplexity": self.result.perplexity,  # replaces the source's
            **({} if self.calibration_kl is None else {"calibration_kl_mean": self.calibration_kl}),
        }


@dataclass(frozen=True)
class CalibrationText:
    """The windows that quantizers are calibrated with; a Material of `evaluation`."""

    calibration: Calibration

    @property
    def text(self) -> Text:
        return Text("", self.calibration.text_sha256)

    def windows(
        self, checkpoint: Checkpoint, tokenizer: LlamaTokenizer, ids: list[int]
    ) -> ScoringWindows:
        """See Material."""
        count, size = self.calibration.ids.shape
        return whole_windows(self.calibration.ids, f"{count} calibration windows of {size}")


def score(
    name: str,
    directory: Path,
    text: Text,
    source: Path,
    *,
    rival: bool,
    calibration: Calibration | None = None,
) -> VariantScore:
    """Score a quantized checkpoint; see `score_each`."""
    named = {name: directory}
    (found,) = score_each(named, text, source, rival=rival, calibration=calibration)
    return found


def score_each(
    named: Mapping[str, Path],
    text: Text,
    source: Path,
    *,
    rival: bool,
    calibration: Calibration | None = None,
) -> tuple[VariantScore, ...]:
    """Score quantized checkpoints in float32 on the CPU. The source is run once for all of them.

    Args:
        named: name -> folder or GGUF file.
        calibration: also score them on this text.

    Raises:
        CheckpointError: a checkpoint is damaged, not quantized, or has another tokenizer than the
            source.
    """
    stored = {name: _stored(directory) for name, directory in named.items()}
    results = _results(named, WholeText(text), source)
    fitted: Sequence[Perplexity | None] = [None] * len(named)
    if calibration is not None:
        fitted = _results(named, CalibrationText(calibration), source)
    return tuple(
        VariantScore(name=name, rival=rival, result=result, on_calibration=fit, **vars(each))
        for (name, each), result, fit in zip(stored.items(), results, fitted, strict=True)
    )


def _results(named: Mapping[str, Path], material: Material, source: Path) -> list[Perplexity]:
    directories = list(named.values())
    windows, scores = score_all(
        directories, material, reference=source, dtype="float32", device="cpu"
    )
    return [Perplexity.of(tokens, windows, material.text.sha256) for tokens in scores]


@dataclass(frozen=True)
class _Stored:
    """How a checkpoint stores its quantized weights; see VariantScore."""

    bits_per_weight: float
    schemes: dict[str, int]
    group_size: int | None


def _stored(directory: Path) -> _Stored:
    weights = _quantized(open_checkpoint(directory))
    if not weights:
        raise CheckpointError(
            "not quantized", where=str(directory), expected="weights of 1 to 8 bits", found="none"
        )
    total = sum(weight.count for weight in weights)
    schemes = {weight.scheme for weight in weights}
    group_sizes = {scheme.group_size if scheme.integer else None for scheme in schemes}
    mixed = len({scheme.bits for scheme in schemes}) > 1 or len(group_sizes) > 1
    names = [weight.stored_as for weight in weights]
    return _Stored(
        bits_per_weight=sum(weight.bits * weight.count for weight in weights) / total,
        schemes={name: names.count(name) for name in sorted(set(names))},
        group_size=None if mixed else group_sizes.pop(),
    )


@dataclass(frozen=True)
class _Quantized:
    """A quantized weight.

    Attributes:
        stored_as: the scheme, or GGUF's type.
        bits: of a weight in the file, scales included.
        count: how many weights it has.
    """

    scheme: Scheme
    stored_as: str
    bits: float
    count: int


def _quantized(checkpoint: Checkpoint) -> list[_Quantized]:
    """The quantized matrices; an embedding and a head do not count."""
    schemes = storage_summary(checkpoint.metadata).schemes
    found = []
    for tensor in checkpoint.tensors:
        if not tensor.linear or tensor.kind == "head" or schemes[tensor.prefix].kind == "dense":
            continue
        scheme, packing = schemes[tensor.prefix], checkpoint.packing(tensor)
        stored_as, bits = str(scheme), scheme.bits_per_weight
        if packing is not None and packing.layout == "GGUF":
            stored_as = gguf_schemes.type_of(packing.infos)
            stored = BY_NAME[stored_as]
            bits = 8 * stored.block_bytes / stored.block_size
        found.append(_Quantized(scheme, stored_as, bits, math.prod(tensor.shape)))
    return found


def rival_directories(parent: Path) -> tuple[Path, ...]:
    """Every checkpoint directory in `parent`, by name.

    Raises:
        CheckpointError: there is none.
    """
    directories = tuple(sorted(path.parent for path in parent.glob("*/config.json")))
    if not directories:
        raise CheckpointError(
            "no checkpoints",
            where=str(parent),
            expected="a directory of checkpoint directories",
            remedy="make rivals writes some to .oracles/rivals.",
        )
    return directories


def rival_to_beat(ours: VariantScore, scores: Sequence[VariantScore]) -> VariantScore | None:
    """The rival of least KL with the same group size.

    Mixed schemes are compared with the rivals of the fewest bits that are not below theirs.
    """
    rivals = [other for other in scores if other.rival]
    if ours.group_size is not None:
        rivals = [other for other in rivals if other.group_size == ours.group_size]
    elif len(ours.schemes) > 1:
        above = [o for o in rivals if o.bits_per_weight >= ours.bits_per_weight - 1e-9]
        least = min((other.bits_per_weight for other in above), default=0.0)
        rivals = [other for other in above if other.bits_per_weight == least]
    else:
        rivals = []
    return min(rivals, key=lambda other: other.kl, default=None)


def kl_ratio(ours: VariantScore, other: VariantScore) -> Estimate:
    """Our KL over another's on the same windows."""
    if ours.result.windows and other.result.windows:
        found = difference(ours.result.windows, other.result.windows).kl_ratio
        if found is not None:
            return found
    return Estimate(ours.kl / other.kl, None)


def score_table(scores: Sequence[VariantScore]) -> str:
    """All scores as a markdown table, the 16-bit model first."""
    header: tuple[str, ...] = SCORE_COLUMNS
    source = scores[0].reference
    rows: list[tuple[str, ...]] = [("bf16", "16.000", f"{source.perplexity:.4f}", "-", "-", "-")]
    rows += [each.cells() for each in scores]
    if any(each.calibration_kl is not None for each in scores):
        header += ("on calibration text", "held-out over it")
        rows = [
            (*row, *(("-", "-") if each is None else _fit(each)))
            for row, each in zip(rows, (None, *scores), strict=True)
        ]
    if any(each.rival for each in scores):
        rivals = [None if each.rival else rival_to_beat(each, scores) for each in scores]
        ratios = [
            _within(kl_ratio(each, rival), ".2f") if rival else "-"
            for each, rival in zip(scores, rivals, strict=True)
        ]
        header += ("KL over the best rival's",)
        rows = [(*row, cell) for row, cell in zip(rows, ("-", *ratios), strict=True)]
    return markdown.table(header, rows)


def ablation_table(scores: Sequence[VariantScore]) -> str:
    """The ablations as a markdown table, each KL over that of the full method."""
    full = {each.group_size: each for each in scores if each.name.endswith("-full")}
    rows = []
    for each in scores:
        base = full.get(each.group_size)
        ratio = "-" if base is None else _within(kl_ratio(each, base), ".3f")
        rows.append((*each.cells(), ratio))
    return markdown.table(("GPTQ", *SCORE_COLUMNS[1:], "KL over full"), rows)


def _fit(each: VariantScore) -> tuple[str, str]:
    """KL on the calibration text, and how much higher it is on the held-out text."""
    kl = each.calibration_kl
    return ("-", "-") if kl is None else (f"{kl:.5f}", f"{each.kl / kl:.2f}")


def _within(ratio: Estimate, form: str) -> str:
    """A ratio and the ends of its interval."""
    if ratio.interval is None:
        return f"{ratio.value:{form}}"
    return f"{ratio.value:{form}} ({ratio.interval.low:{form}} to {ratio.interval.high:{form}})"
