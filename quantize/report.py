"""What a quantization did, in numbers: by kind of tensor and in total. Knows nothing of methods."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmix.formats.names import TensorKind
from qmix.planning.byte_sizes import show
from qmix.quantities import amount, counted, duration, weights
from qmix.weights.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class TensorResult:
    """The outcome for one tensor.

    Attributes:
        squared_error, squared_norm: sums over the weight; both 0 where nothing was rounded.
        seconds: time spent on the tensor.
        tokens: number of tokens that the matrix saw in calibration; None without calibration.
        output_error: relative error of its outputs over those tokens.
        damping: the damping that GPTQ needed; None if it could not use the tokens.
        raised: how often the damping was raised tenfold before H could be factored.
        fallback: why GPTQ rounded the weight to nearest; None if it did not.
    """

    name: str
    kind: TensorKind
    scheme: Scheme
    parameters: int
    bytes_out: int
    squared_error: float
    squared_norm: float
    seconds: float
    tokens: int | None = None
    output_error: float | None = None
    damping: float | None = None
    raised: int = 0
    fallback: str | None = None

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "TensorResult":
        """The inverse of `asdict`."""
        return cls(**{**document, "scheme": Scheme(**document["scheme"])})

    @property
    def relative_error(self) -> float:
        """`|W - Q(W)| / |W|` in the Frobenius norm."""
        if not self.squared_norm:
            return 0.0
        return float((self.squared_error / self.squared_norm) ** 0.5)

    def calibration_dict(self) -> dict[str, Any]:
        """The fields that come from calibration, as JSON; empty without calibration."""
        if self.tokens is None:
            return {}
        return {
            "tokens": self.tokens,
            "output_error": None if self.output_error is None else round(self.output_error, 6),
            "damping": self.damping,
            "raised": self.raised,
            "fallback": self.fallback,
        }


# Of KindSummary.cells. The last is for methods that are calibrated.
KIND_HEADER = (
    *("tensors", "stored as", "count", "weights", "bits/weight", "relative error"),
    "output error",
)


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """All tensors of one kind and scheme; `output_error` is the root mean square over them."""

    kind: str
    scheme: str
    tensors: int
    parameters: int
    bits_per_weight: float
    relative_error: float
    output_error: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of a table under KIND_HEADER."""
        return (
            self.kind,
            self.scheme,
            str(self.tensors),
            weights(self.parameters),
            f"{self.bits_per_weight:.3f}",
            f"{self.relative_error:.4f}" if self.relative_error else "-",
            "-" if self.output_error is None else f"{self.output_error:.4f}",
        )


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a calibrated run took, and what it would take on a GPU.

    `qmix.planning.quantize_cost` estimates the figures that are not measured.

    Attributes:
        layers: number of layers that were rounded.
        layer_seconds: time that rounding them took.
        layer_flops: floating-point operations of one layer, estimated.
        peak_bytes: largest size of all arrays, estimated.
        resident_bytes: peak resident memory of the process, measured; None where the system does
            not report it.
        gpu_seconds: estimated time of 32 layers on an H100.
    """

    layers: int
    layer_seconds: float
    layer_flops: float
    peak_bytes: int
    resident_bytes: int | None
    gpu_seconds: float

    def lines(self) -> tuple[str, ...]:
        """The figures in words, as two lines."""
        rate = self.layers * self.layer_flops / self.layer_seconds
        resident = ""
        if self.resident_bytes is not None:
            resident = f", {show(self.resident_bytes)} resident at most"
        return (
            f"{counted(self.layers, 'layer')} of {amount(self.layer_flops, 'FLOP')} in "
            f"{duration(self.layer_seconds)}: {amount(rate, 'FLOP/s')}{resident}",
            f"32 such layers: {duration(32 * self.layer_flops / rate)} at this rate, "
            f"{show(self.peak_bytes)} of arrays; by arithmetic {duration(self.gpu_seconds)} on an "
            "H100",
        )


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The outcome of a whole run: sizes in bytes, time in seconds.

    Attributes:
        effort: None unless the run was calibrated.
    """

    method: str
    tensors: tuple[TensorResult, ...]
    bytes_in: int
    seconds: float
    effort: Effort | None = None

    @property
    def bytes_out(self) -> int:
        """Bytes of all output tensors."""
        return sum(tensor.bytes_out for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """The average over all weights, including those that stayed in 16 bits."""
        return 8 * self.bytes_out / self.parameters

    def kinds(self) -> tuple[KindSummary, ...]:
        """One summary for each kind and scheme, in order of first appearance."""
        groups: dict[tuple[str, Scheme], list[TensorResult]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.kind, tensor.scheme), []).append(tensor)
        return tuple(_summary(kind, scheme, group) for (kind, scheme), group in groups.items())

    def remarks(self) -> tuple[str, ...]:
        """What a user should know about a calibrated run, as lines; empty without calibration."""
        tokens_seen = {
            tensor.name: tensor.tokens
            for tensor in self.tensors
            if tensor.kind == "expert" and tensor.tokens is not None
        }
        if not tokens_seen:
            return ()
        least = min(tokens_seen, key=lambda name: tokens_seen[name])
        lines = [
            f"experts saw {tokens_seen[least]:,} ({least.removesuffix('.weight')}) to "
            f"{counted(max(tokens_seen.values()), 'token')} each"
        ]
        raised = [tensor for tensor in self.tensors if tensor.raised]
        if raised:
            lines.append(
                f"{counted(len(raised), 'matrix')} needed more damping, {raised[0].name} first"
            )
        fallbacks = [tensor for tensor in self.tensors if tensor.fallback]
        if fallbacks:
            lines.append(
                f"rounded to nearest: {counted(len(fallbacks), 'matrix')}, {fallbacks[0].name} first: "
                f"{fallbacks[0].fallback}"
            )
        return (*lines, *(self.effort.lines() if self.effort else ()))

    def to_dict(self) -> dict[str, Any]:
        """The report as a JSON document."""
        return {
            "method": self.method,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds": round(self.seconds, 2),
            "effort": asdict(self.effort) if self.effort else None,
            "kinds": [asdict(kind) for kind in self.kinds()],
            "tensors": [
                {
                    "name": tensor.name,
                    "scheme": str(tensor.scheme),
                    "relative_error": round(tensor.relative_error, 6),
                    "seconds": round(tensor.seconds, 3),
                    **tensor.calibration_dict(),
                }
                for tensor in self.tensors
                if tensor.scheme.kind != "dense"
            ],
        }


def _summary(kind: str, scheme: Scheme, tensors: Sequence[TensorResult]) -> KindSummary:
    parameters = sum(tensor.parameters for tensor in tensors)
    norm = sum(tensor.squared_norm for tensor in tensors)
    error = sum(tensor.squared_error for tensor in tensors)
    outputs = [tensor.output_error for tensor in tensors if tensor.output_error is not None]
    return KindSummary(
        kind=kind,
        scheme=str(scheme),
        tensors=len(tensors),
        parameters=parameters,
        bits_per_weight=8 * sum(tensor.bytes_out for tensor in tensors) / parameters,
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
        output_error=(sum(e * e for e in outputs) / len(outputs)) ** 0.5 if outputs else None,
    )
