"""The protocol of all weights, and the weight in 16 or 32 bits.

Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qmix.weights.scheme import DENSE, Scheme


@runtime_checkable
class Weight(Protocol):
    """The weight [N, K] of one linear layer, in whichever form it is stored."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def scheme(self) -> Scheme: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def nbytes(self) -> int: ...
    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor: ...
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...
    def to(self, device: torch.device) -> "Weight": ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight that is not quantized: `data` [N, K] in 16 or 32 bits."""

    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def scheme(self) -> Scheme:
        return DENSE

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K]."""
        return self.data[start:stop].to(dtype or self.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K]."""
        return self.data.to(dtype or self.dtype)

    def take(self, rows: Tensor) -> "Dense":
        """The weight of some rows, int64 [n]."""
        return replace(self, data=self.data.index_select(0, rows))

    def to(self, device: torch.device) -> "Dense":
        return replace(self, data=self.data.to(device))


def all_finite(data: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    Both show in a sum, which is thirty times as fast as torch.isfinite. Only the rows whose sum is
    not finite, as that of large values may be, are looked at one value at a time.
    """
    if data.itemsize == 1:
        data = data.float()  # torch adds no eight-bit floats
    rows = data if data.dim() > 1 else data.reshape(1, -1)
    doubtful = ~torch.isfinite(rows.sum(-1))
    return not bool(doubtful.any()) or bool(torch.isfinite(rows[doubtful]).all())
