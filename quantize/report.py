"""What a quantization did, in numbers: by kind of tensor and in all. Knows nothing of how."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmix.formats.names import TensorKind
from qmix.weights.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class TensorResult:
    """One tensor's outcome.

    Attributes:
        squared_error, squared_norm: sums over the weight; both 0 where nothing was rounded.
        tokens: that the matrix saw in calibration; None without one.
        output_error: relative, over those tokens.
        damping: that GPTQ needed; None if it had no use for the tokens.
        raised: how often the damping was raised tenfold before H could be factored.
        fallback: why GPTQ's weight was rounded to nearest; None if it was not.
        seconds: of work.
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
    def of(cls, document: Mapping[str, Any]) -> "TensorResult":
        """From what `asdict` made of one."""
        return cls(**{**document, "scheme": Scheme(**document["scheme"])})

    @property
    def relative_error(self) -> float:
        """`|W - Q(W)| / |W|` in the Frobenius norm."""
        if not self.squared_norm:
            return 0.0
        return float((self.squared_error / self.squared_norm) ** 0.5)

    def calibrated(self) -> dict[str, Any]:
        """What calibration has to say of it, as JSON; nothing without one."""
        if self.tokens is None:
            return {}
        return {
            "tokens": self.tokens,
            "output_error": None if self.output_error is None else round(self.output_error, 6),
            "damping": self.damping,
            "raised": self.raised,
            "fallback": self.fallback,
        }


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """All tensors of one kind and scheme; `output_error` is the root mean square of theirs."""

    kind: str
    scheme: str
    tensors: int
    parameters: int
    bits_per_weight: float
    relative_error: float
    output_error: float | None


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a calibrated run took, and would take elsewhere, by the arithmetic of `qmix.planning.quantize_cost`.

    Attributes:
        layers: that were rounded. layer_seconds: of their rounding.
        layer_flops: of one. peak_bytes: of arrays, by arithmetic.
        resident_bytes: the most that the process held, measured; None where the system cannot tell.
        gpu_seconds: of 32 layers on a GPU of `gpu_flops`.
    """

    layers: int
    layer_seconds: float
    layer_flops: float
    peak_bytes: int
    resident_bytes: int | None
    gpu_seconds: float
    gpu_flops: float

    def lines(self) -> tuple[str, ...]:
        """In words, a line each."""
        rate = self.layers * self.layer_flops / self.layer_seconds
        resident = ""
        if self.resident_bytes is not None:
            resident = f", {self.resident_bytes / 2**30:.2f} GiB resident at most"
        return (
            f"{self.layers} layers of {self.layer_flops / 1e12:.2f} TFLOP in "
            f"{self.layer_seconds:.0f} s: {rate / 1e9:.0f} GFLOP/s{resident}",
            f"32 such layers: {32 * self.layer_flops / rate / 3600:.2f} h at this rate, "
            f"{self.peak_bytes / 2**30:.2f} GiB of arrays; by arithmetic {self.gpu_seconds / 60:.0f} "
            f"min on a GPU at {self.gpu_flops / 1e12:.0f} TFLOP/s in float32",
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run: sizes in bytes, time in seconds; `effort` of calibrated ones."""

    method: str
    tensors: tuple[TensorResult, ...]
    bytes_in: int
    seconds: float
    effort: "Effort | None" = None

    @property
    def bytes_out(self) -> int:
        """Of the tensors."""
        return sum(tensor.bytes_out for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights, those that stayed 16-bit included."""
        return 8 * self.bytes_out / self.parameters

    def kinds(self) -> tuple[KindSummary, ...]:
        """One row a kind and scheme, in the order of first appearance."""
        groups: dict[tuple[str, Scheme], list[TensorResult]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.kind, tensor.scheme), []).append(tensor)
        return tuple(_summary(kind, scheme, rows) for (kind, scheme), rows in groups.items())

    def remarks(self) -> tuple[str, ...]:
        """What a user should know of a calibrated run, a line each; nothing without calibration."""
        seen = {
            tensor.name: tensor.tokens
            for tensor in self.tensors
            if tensor.kind == "expert" and tensor.tokens is not None
        }
        if not seen:
            return ()
        least = min(seen, key=lambda name: seen[name])
        lines = [
            f"experts saw {seen[least]:,} ({least.removesuffix('.weight')}) to "
            f"{max(seen.values()):,} tokens each"
        ]
        raised = [tensor for tensor in self.tensors if tensor.raised]
        if raised:
            lines.append(f"{len(raised)} matrices needed more damping, {raised[0].name} first")
        given_up = [tensor for tensor in self.tensors if tensor.fallback]
        if given_up:
            lines.append(
                f"{len(given_up)} matrices were rounded to nearest, {given_up[0].name} first: "
                f"{given_up[0].fallback}"
            )
        return (*lines, *(self.effort.lines() if self.effort else ()))

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
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
                    **tensor.calibrated(),
                }
                for tensor in self.tensors
                if tensor.scheme.kind != "dense"
            ],
        }


def _summary(kind: str, scheme: Scheme, rows: Sequence[TensorResult]) -> KindSummary:
    parameters = sum(row.parameters for row in rows)
    norm = sum(row.squared_norm for row in rows)
    error = sum(row.squared_error for row in rows)
    outputs = [row.output_error for row in rows if row.output_error is not None]
    return KindSummary(
        kind=kind,
        scheme=str(scheme),
        tensors=len(rows),
        parameters=parameters,
        bits_per_weight=8 * sum(row.bytes_out for row in rows) / parameters,
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
        output_error=(sum(e * e for e in outputs) / len(outputs)) ** 0.5 if outputs else None,
    )
