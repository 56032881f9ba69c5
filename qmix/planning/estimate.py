"""What a plan means: how fast it is, what quantizing costs, and what would help, in figures.

Pure arithmetic over plans and rates. Knows no torch and does not look at the machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qmix.planning import budget, quantize_cost
from qmix.planning.plan import Plan
from qmix.planning.roofline import Rates
from qmix.planning.speed import Speed, rates_used, speeds
from qmix.planning.stored_model import StoredModel
from qmix.planning.suggestions import Suggestion, suggestions
from qmix.weights.scheme import Scheme

# 9.23 GB of bfloat16 to NF4 in 36 s on two processors, with checksums and fsync (evals/LOG.md).
REWRITE_BANDWIDTH = 0.256e9
# GPTQ of full-width layers on two processors: 29 % of a layer of 146 TFLOP in 30 minutes of one
# processor's time (evals/LOG.md). Good for the order of magnitude only.
CPU_FLOPS = 23e9
_CALIBRATION = quantize_cost.CALIBRATION_WINDOWS * quantize_cost.CALIBRATION_POSITIONS  # tokens


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What `qmix quantize` takes to quantize a 16-bit checkpoint.

    Attributes:
        bytes_in, bytes_out: of the weights' files. scratch: on the disk while it runs.
        peak: of host memory.
        seconds: on two processors. gpu_seconds: on a large GPU; None if the method uses none.
        source: where the times come from.
    """

    method: str
    scheme: str
    bytes_in: int
    bytes_out: int
    scratch: int
    peak: int
    seconds: float
    gpu_seconds: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan with all that follows from it."""

    plan: Plan
    rates: Rates
    speeds: tuple[Speed, ...]
    quantization: tuple[Quantization, ...]
    suggestions: tuple[Suggestion, ...]

    def to_dict(self) -> dict[str, Any]:
        """The estimate as a JSON document, in bytes and bytes a second."""
        model = self.plan.model
        used = sorted(rates_used(self.speeds))
        return {
            "model": model.name,
            "assumed": model.assumption,
            "weights_bytes": model.file_bytes,
            **self.plan.to_dict(),
            "rates": {name: asdict(getattr(self.rates, name)) for name in used},
            "speeds": [asdict(speed) for speed in self.speeds],
            "quantization": [asdict(quantization) for quantization in self.quantization],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
        }


def estimate(
    planned: Plan,
    rates: Rates,
    in_bits: Callable[[float], StoredModel],
    source: StoredModel | None = None,
) -> Estimate:
    """All that follows from a plan.

    Args:
        in_bits: the model as `--method auto` stores it in so many bits a weight.
        source: the 16-bit checkpoint, if the planned one is still to be quantized from it.
    """
    return Estimate(
        plan=planned,
        rates=rates,
        speeds=tuple(speeds(planned, rates)),
        quantization=tuple(_quantization(planned.model, source)) if source else (),
        suggestions=tuple(suggestions(planned, rates, in_bits)),
    )


def _quantization(target: StoredModel, source: StoredModel) -> Iterator[Quantization]:
    assumed = target.assumed
    assert assumed is not None
    bytes_in = source.file_bytes
    if not target.mixed:
        yield Quantization(
            method="nf4" if assumed.kind == "nf4" else "rtn",
            scheme=str(assumed),
            bytes_in=bytes_in,
            bytes_out=target.file_bytes,
            scratch=0,
            peak=budget.for_rewriting(source.largest).total,
            seconds=bytes_in / REWRITE_BANDWIDTH,
            gpu_seconds=None,
            source="0.256 GB/s, measured on two processors",
        )
    integers = assumed if assumed.kind == "int4" else Scheme(kind="int4")
    work = quantize_cost.work(target.config, _CALIBRATION)
    layers = target.config.num_hidden_layers
    tokens = quantize_cost.token_bytes(target.config, _CALIBRATION)
    in_memory = tokens if tokens <= quantize_cost.ACTIVATION_BYTES else 0
    states = quantize_cost.state_bytes(target.config, quantize_cost.GRADIENT_TOKENS)
    passed = states + layers * quantize_cost.gradient_bytes(target.config)
    fitted = target
    if not target.mixed:
        fitted = StoredModel.assume(target.name, target.config, integers)
    yield Quantization(
        method="auto" if target.mixed else "gptq",
        scheme=fitted.assumption or "",
        bytes_in=bytes_in,
        bytes_out=fitted.file_bytes,
        scratch=passed + (0 if in_memory else tokens),
        peak=max(
            budget.for_calibration(target.config, _CALIBRATION, in_memory).total,
            budget.for_backward(target.config, 0).total,
        ),
        seconds=layers * work.flops / CPU_FLOPS,
        gpu_seconds=work.gpu_seconds(layers),
        source=f"{layers * work.flops / 1e15:.3g} PFLOP at {CPU_FLOPS / 1e9:.0f} GFLOP/s, or "
        "on an H100 with 80 GB: by arithmetic" + (", rounding alone" if target.mixed else ""),
    )
