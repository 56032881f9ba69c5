"""Several weights with the same inputs as one, the outputs of each in turn.

Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.weights.dense import Weight
from qmix.weights.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Stacked:
    """Weights [N1, K], [N2, K], ... as one of N1 + N2 + ... outputs."""

    parts: tuple[Weight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def scheme(self) -> Scheme:
        """That of the first."""
        return self.parts[0].scheme

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K]."""
        dtype = dtype or self.dtype
        found, first = [], 0
        for part in self.parts:
            last = first + part.shape[0]
            own = max(start, first), min(stop, last)
            if own[0] < own[1]:
                found.append(part.rows(own[0] - first, own[1] - first, dtype))
            first = last
        return found[0] if len(found) == 1 else torch.cat(found)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K]."""
        return self.rows(0, self.shape[0], dtype)

    def to(self, device: torch.device) -> "Stacked":
        return Stacked(tuple(part.to(device) for part in self.parts))
