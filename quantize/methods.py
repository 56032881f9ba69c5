"""From a request to quantize to the method that does it. Knows the methods' entry points only."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmix.errors import UsageError
from qmix.formats.files import output_dir
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.models.options import parse_device
from qmix.planning.quantize_cost import CALIBRATION_POSITIONS, CALIBRATION_WINDOWS
from qmix.processes.group import ALONE, Group
from qmix.quantize.adapter import with_adapter
from qmix.quantize.calibrated.bit_allocation import (
    DEFAULT_BITS,
    Choices,
    allocate_bits,
    choices_for,
)
from qmix.quantize.calibrated.follower import follow_quantize
from qmix.quantize.calibrated.layer_work import EXPECTED, LayerWork
from qmix.quantize.calibrated.options import CalibratedOptions, LayerOptions, Objective
from qmix.quantize.calibrated.run import prepare, quantize_calibrated
from qmix.quantize.calibrated.sensitivity import Sensitivity
from qmix.quantize.calibrated.windows import Calibration, calibration_windows
from qmix.quantize.output_checkpoint import plan_outputs
from qmix.quantize.report import QuantizeReport
from qmix.quantize.shard_supply import ShardSupply
from qmix.quantize.source import Source, open_source
from qmix.quantize.streaming import quantize_streaming
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights.scheme import Recipe, Scheme, check_group_size
from qmix.work_meter import Progress, WorkMeter

Method = Literal["nf4", "fp4", "gptq", "rtn", "auto"]


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What a user asks for, checked as far as possible without the model.

    Attributes:
        attention: whether the attention's matrices are quantized too.
        group_size: inputs of a group; None means 128.
        bits: bits a weight for `auto`; None means 4.25.
        calibration: the file of the user's calibration text, which the caller reads.
        objective: what a calibrated method should change least: the outputs of each matrix
            ("layer") or the model's predictions ("loss"); None means "loss".
        samples: windows of calibration text; None means 256.
        seqlen: tokens of a window; None means 2048, or the model's positions if they are fewer.
        adapter: the folder of a LoRA that is merged into the weights before they are rounded.
        requantize: take a quantized source too, and round what it decodes to.
        discard_source: each file of the source is removed once it has been read.
        documents: a model card and a page with pictures are written too.

    Raises:
        UsageError: an option that does not apply to the method, or a group size or bits out of
            range.
    """

    method: Method
    attention: bool = True
    double_quant: bool = True
    group_size: int | None = None
    asymmetric: bool = False
    bits: float | None = None
    calibration: Path | None = None
    objective: Objective | None = None
    samples: int | None = None
    seqlen: int | None = None
    device: str | None = None
    shard_bytes: int = SHARD_BYTES
    resume: bool = False
    force: bool = False
    adapter: Path | None = None
    requantize: bool = False
    discard_source: bool = False
    documents: bool = False

    def __post_init__(self) -> None:
        does_not_apply = {
            "--group-size": self.group_size is not None and self.method not in ("gptq", "rtn"),
            "--asymmetric": self.asymmetric and self.method not in ("gptq", "rtn"),
            "--no-double-quant": not self.double_quant and self.method not in ("nf4", "fp4"),
            "--bits": self.bits is not None and self.method != "auto",
            "--calibration": self.calibration is not None and not self.calibrated,
            "--objective": self.objective is not None and not self.calibrated,
            "--samples": self.samples is not None and not self.calibrated,
            "--seqlen": self.seqlen is not None and not self.calibrated,
            "--resume": self.resume and not self.calibrated,
            "--discard-source": self.discard_source and self.calibrated,
            "--device": self.device is not None and not self.calibrated,
        }
        for option, refused in does_not_apply.items():
            if refused:
                raise UsageError(f"{option} does not apply to --method {self.method}")
        if self.group_size is not None:
            check_group_size(self.group_size)
        if self.method == "auto":
            choices_for(self.budget)

    @property
    def calibrated(self) -> bool:
        """Whether the method needs calibration text."""
        return self.method in ("gptq", "auto")

    @property
    def budget(self) -> float:
        """Bits a weight for `auto`."""
        return DEFAULT_BITS if self.bits is None else self.bits

    @property
    def choices(self) -> Choices:
        """The schemes among which `auto` chooses."""
        return choices_for(self.budget)

    @property
    def scheme(self) -> Scheme:
        """The scheme of every quantized weight; for `auto` the typical one."""
        if self.method == "auto":
            return self.choices.typical
        if self.method in ("nf4", "fp4"):
            kind: Literal["nf4", "fp4"] = "fp4" if self.method == "fp4" else "nf4"
            return Scheme(kind=kind, double_quant=self.double_quant)
        return Scheme(kind="int4", group_size=self.group_size or 128, symmetric=not self.asymmetric)


def quantize_checkpoint(
    source: Path,
    out: Path,
    request: QuantizeRequest,
    text: str | None,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    progress: Progress = lambda what, done, total: None,
    supply: ShardSupply | None = None,
    group: Group = ALONE,
) -> QuantizeReport:
    """Quantize the checkpoint directory `source` into `out`.

    Args:
        group: this process, and those that call `follow_quantize_checkpoint`.
        supply: see `quantize_streaming`; the calibrated methods need every file to the end.
        text: the calibration text; None for a method that needs none.
        interrupted: see `quantize_calibrated`.
        progress: called with what is done now, and how much is done of how much in all: bytes, or
            with calibration seconds; 0 of 0 where nobody knows.

    Raises:
        QmixError: see `quantize_streaming` and `quantize_calibrated`.
    """
    recipe = Recipe.uniform(request.scheme, attention=request.attention)
    if not request.calibrated:
        return quantize_streaming(
            source,
            out,
            recipe,
            method=request.method,
            shard_bytes=request.shard_bytes,
            force=request.force,
            progress=progress,
            supply=supply,
            adapter=request.adapter,
            requantize=request.requantize,
            documents=request.documents,
        )
    assert text is not None
    return _calibrated(source, out, request, text, recipe, interrupted, progress, group)


def follow_quantize_checkpoint(
    source: Callable[[], Path], request: QuantizeRequest, group: Group
) -> None:
    """Do this process's share of what the first of the group quantizes.

    Args:
        source: gives the directory of the checkpoint; called when the first process has it.

    Raises:
        QmixError: see `follow_quantize`.
    """
    follow_quantize(lambda: _opened(source(), request), _options(request), group)


def _calibrated(
    source: Path,
    out: Path,
    request: QuantizeRequest,
    text: str,
    recipe: Recipe,
    interrupted: Callable[[], bool],
    progress: Progress,
    group: Group,
) -> QuantizeReport:
    """By a method that needs calibration text."""
    output_dir.check_paths(source, out, force=request.force)  # before an hour of measuring
    opened = _opened(source, request)
    progress("tokenizing", 0.0, 0.0)
    calibration = _calibration(opened, request, text)
    options = _options(request)
    meter = WorkMeter(EXPECTED, progress)
    if request.method == "auto":
        # Refused before an hour of measuring: what fits no scheme, or not even at the fewest bits.
        recipes = [
            Recipe.uniform(scheme, attention=request.attention)
            for scheme in request.choices.schemes
        ]
        for each in recipes:
            plan_outputs(opened, each, requantize=request.requantize)
        prepare(opened, out, recipes[0], calibration, options, group)
        recipe = _measured_recipe(opened, calibration, request, options, meter)
    return quantize_calibrated(
        opened,
        out,
        recipe,
        calibration,
        options,
        method=request.method,
        resumed=request.resume,
        force=request.force,
        documents=request.documents,
        interrupted=interrupted,
        meter=meter,
        group=group,
    )


def _opened(source: Path, request: QuantizeRequest) -> Source:
    opened = open_source(source)
    return opened if request.adapter is None else with_adapter(opened, request.adapter)


def _options(request: QuantizeRequest) -> CalibratedOptions:
    return CalibratedOptions(
        layer=LayerOptions(objective=request.objective or LayerOptions.objective),
        device=parse_device(request.device),
        shard_bytes=request.shard_bytes,
        requantize=request.requantize,
    )


def _calibration(source: Source, request: QuantizeRequest, text: str) -> Calibration:
    positions = source.config.max_position_embeddings
    seqlen = min(CALIBRATION_POSITIONS, positions) if request.seqlen is None else request.seqlen
    if seqlen > positions:
        raise UsageError(
            "longer than the model's positions",
            where="--seqlen",
            expected=f"at most {positions}",
            found=seqlen,
        )
    samples = CALIBRATION_WINDOWS if request.samples is None else request.samples
    tokenizer = LlamaTokenizer.from_pretrained(source.shards.directory)
    return calibration_windows(text, tokenizer.encode, samples=samples, seqlen=seqlen)


def _measured_recipe(
    source: Source,
    calibration: Calibration,
    request: QuantizeRequest,
    options: CalibratedOptions,
    meter: WorkMeter,
) -> Recipe:
    """The bits of each matrix, by their measured losses."""
    sensitivity = Sensitivity(
        source,
        calibration.ids,
        request.choices,
        attention=request.attention,
        device=options.device,
    )
    # The rounding, which is planned again when it begins, counts from the start.
    tokens, window = calibration.ids.numel(), calibration.ids.shape[1]
    each = LayerWork(source.config, options.layer, window, options.device)
    recipe = Recipe.uniform(request.scheme, attention=request.attention)
    rounding = each.totals(range(source.config.num_hidden_layers), tokens, recipe)
    meter.plan(rounding)
    groups = sensitivity.groups(meter)
    meter.drop(rounding)
    return allocate_bits(groups, request.budget)
