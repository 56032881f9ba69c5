"""What a quantization did, in numbers: by kind of tensor and in all. Knows nothing of how."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmix.formats.names import Kind
from qmix.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class TensorResult:
    """One tensor's outcome.

    Attributes:
        squared_error, squared_norm: sums over the weight; both 0 where nothing was rounded.
    """

    name: str
    kind: Kind
    scheme: Scheme
    parameters: int
    bytes_out: int
    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """`|W - Q(W)| / |W|` in the Frobenius norm."""
        if not self.squared_norm:
            return 0.0
        return float((self.squared_error / self.squared_norm) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class KindSummary:
    """All tensors of one kind and scheme."""

    kind: str
    scheme: str
    tensors: int
    parameters: int
    bits_per_weight: float
    relative_error: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole run: sizes in bytes, time in seconds."""

    method: str
    tensors: tuple[TensorResult, ...]
    bytes_in: int
    bytes_out: int
    seconds: float

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over all weights, those that stayed 16-bit included."""
        return 8 * sum(tensor.bytes_out for tensor in self.tensors) / self.parameters

    def kinds(self) -> tuple[KindSummary, ...]:
        """One row a kind and scheme, in the order of first appearance."""
        groups: dict[tuple[str, Scheme], list[TensorResult]] = {}
        for tensor in self.tensors:
            groups.setdefault((tensor.kind, tensor.scheme), []).append(tensor)
        return tuple(_summary(kind, scheme, rows) for (kind, scheme), rows in groups.items())

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "method": self.method,
            "parameters": self.parameters,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "seconds": round(self.seconds, 2),
            "kinds": [asdict(kind) for kind in self.kinds()],
            "tensors": [
                {
                    "name": tensor.name,
                    "scheme": str(tensor.scheme),
                    "relative_error": round(tensor.relative_error, 6),
                }
                for tensor in self.tensors
                if tensor.scheme.kind != "dense"
            ],
        }


def _summary(kind: str, scheme: Scheme, rows: Sequence[TensorResult]) -> KindSummary:
    parameters = sum(row.parameters for row in rows)
    norm = sum(row.squared_norm for row in rows)
    error = sum(row.squared_error for row in rows)
    return KindSummary(
        kind=kind,
        scheme=str(scheme),
        tensors=len(rows),
        parameters=parameters,
        bits_per_weight=8 * sum(row.bytes_out for row in rows) / parameters,
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
    )
