"""One request to quantize -> the method that does it. Knows the methods' entries, not their insides."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.formats import open_checkpoint
from qmix.formats.files import output_dir
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.models.options import parse_device
from qmix.quantize import streaming
from qmix.quantize.calibrated import bit_allocation
from qmix.quantize.calibrated import run as calibrated
from qmix.quantize.calibrated import windows as calibration
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.report import Report
from qmix.quantize.streaming import Progress
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights.scheme import GROUP_SIZES, Recipe, Scheme

Method = Literal["nf4", "gptq", "rtn", "auto"]

_SEQLEN = 2048
_BITS = 4.25


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for, checked as far as it can be without the model.

    Attributes:
        attention: whether the attention's matrices are quantized too.
        group_size, bits, seqlen: None is the default, 128, 4.25 and 2048 or the model's positions.

    Raises:
        UsageError: an option that the method does not have, or out of its range.
    """

    method: Method
    attention: bool = True
    double_quant: bool = True
    group_size: int | None = None
    asymmetric: bool = False
    bits: float | None = None
    samples: int = 256
    seqlen: int | None = None
    device: str | None = None
    shard_bytes: int = SHARD_BYTES
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        foreign = {
            "--group-size": self.group_size is not None and self.method not in ("gptq", "rtn"),
            "--asymmetric": self.asymmetric and self.method not in ("gptq", "rtn"),
            "--no-double-quant": not self.double_quant and self.method != "nf4",
            "--bits": self.bits is not None and self.method != "auto",
            "--seqlen": self.seqlen is not None and not self.calibrated,
            "--resume": self.resume and not self.calibrated,
            "--device": self.device is not None and not self.calibrated,
        }
        for option, given in foreign.items():
            if given:
                raise UsageError(f"{option} means nothing to --method {self.method}")
        if self.group_size is not None and self.group_size not in (-1, *GROUP_SIZES):
            raise UsageError(
                "no such group size",
                where="--group-size",
                expected=f"-1 or one of {', '.join(map(str, GROUP_SIZES))}",
                found=self.group_size,
            )

    @property
    def calibrated(self) -> bool:
        """Whether the method looks at text."""
        return self.method in ("gptq", "auto")

    @property
    def scheme(self) -> Scheme:
        if self.method == "nf4":
            return Scheme(kind="nf4", double_quant=self.double_quant)
        return Scheme(kind="int4", group_size=self.group_size or 128, symmetric=not self.asymmetric)


def run(
    source: Path,
    out: Path,
    request: Request,
    text: str | None,
    *,
    interrupted: Callable[[], bool] = lambda: False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Report:
    """Quantize `source` into `out`.

    Args:
        text: of the calibration; None for methods without one.
        interrupted, progress: see `calibrated.run`.

    Raises:
        QmixError: see `pipeline.run` and `calibrated.run`.
    """
    recipe = Recipe.uniform(request.scheme, attention=request.attention)
    if not request.calibrated:
        return streaming.run(
            source,
            out,
            recipe,
            method=request.method,
            shard_bytes=request.shard_bytes,
            force=request.force,
            progress=progress,
        )
    assert text is not None
    output_dir.check_paths(source, out, force=request.force)  # before an hour of measuring
    positions = MixtralConfig.from_pretrained(source).max_position_embeddings
    seqlen = min(_SEQLEN, positions) if request.seqlen is None else request.seqlen
    if seqlen > positions:
        raise UsageError(
            "longer than the model's positions",
            where="--seqlen",
            expected=f"at most {positions}",
            found=seqlen,
        )
    tokenizer = LlamaTokenizer.from_pretrained(source)
    windows = calibration.cut(text, tokenizer.encode, samples=request.samples, seqlen=seqlen)
    device = parse_device(request.device)
    if request.method == "auto":
        recipe = _chosen(source, windows, request, device, progress)
    options = calibrated.Options(device=device, shard_bytes=request.shard_bytes)
    return calibrated.run(
        source,
        out,
        recipe,
        windows,
        options,
        method=request.method,
        resumed=request.resume,
        force=request.force,
        interrupted=interrupted,
        progress=progress,
    )


def _chosen(
    source: Path,
    windows: Calibration,
    request: Request,
    device: torch.device,
    progress: Callable[[Progress], None],
) -> Recipe:
    bits = _BITS if request.bits is None else request.bits
    bit_allocation.check(bits)
    checkpoint = open_checkpoint(source)
    streaming.plan(checkpoint, Recipe.uniform(request.scheme, attention=request.attention))
    measured = bit_allocation.Sensitivity(
        checkpoint, windows.ids, attention=request.attention, device=device
    ).groups(lambda done, total: progress(Progress(done, total, f"measuring layer {done + 1}")))
    return bit_allocation.recipe(measured, bits)
