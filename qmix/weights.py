"""Weight types: frozen bundles of tensors whose `dequantize` defines what their bits mean.

Shape letters: N output features, K input features, B blocks.
Knows nothing of files, kernels or models.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from qmix.scheme import DENSE, NESTED_BLOCK, Scheme


@runtime_checkable
class Weight(Protocol):
    """The weight [N, K] of one linear layer, however it is stored."""

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
    """A weight stored as it is: `data` [N, K] in 16 or 32 bits."""

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

    def to(self, device: torch.device) -> "Dense":
        return replace(self, data=self.data.to(device))


@dataclass(frozen=True, eq=False)
class NestedAbsmax:
    """Block scales in 8 bits: `map[codes] * absmax[i // 256] + offset` (double quantization).

    Attributes:
        codes: uint8 [B].
        absmax: float32 [ceil(B / 256)].
        map: float32 [256], the signed dynamic map.
        offset: the mean that was subtracted before quantizing.
    """

    codes: Tensor
    absmax: Tensor
    map: Tensor
    offset: float


@dataclass(frozen=True, eq=False)
class NF4:
    """A weight in 4-bit codes with one absmax per block, in bitsandbytes' layout.

    The flattened weight is cut into blocks of `block_size` consecutive elements; two codes share
    a byte, the first in the high nibble: elements `[a b | c d]` are the bytes `[ab cd]`.
    `value = table[code] * absmax[block]`, computed in float32 and rounded once to the dtype asked for.

    Attributes:
        codes: uint8 [N * K / 2] (N * K rounded up to even).
        absmax: float32 [B], or NestedAbsmax.
        table: float32 [16], the value of each code.
        out_shape: (N, K).
        out_dtype: the dtype the weight had before quantization; the default of `dequantize`.
        block_size: elements a block; a power of two.
    """

    codes: Tensor
    absmax: Tensor | NestedAbsmax
    table: Tensor
    out_shape: tuple[int, int]
    out_dtype: torch.dtype
    block_size: int = 64

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_shape

    @property
    def scheme(self) -> Scheme:
        return Scheme(
            kind="nf4",
            block_size=self.block_size,
            double_quant=isinstance(self.absmax, NestedAbsmax),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.out_dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the two constant tables are not counted."""
        if isinstance(self.absmax, NestedAbsmax):
            return self.codes.nbytes + self.absmax.codes.nbytes + self.absmax.absmax.nbytes
        return self.codes.nbytes + self.absmax.nbytes

    def scales(self, start: int, stop: int) -> Tensor:
        """The float32 absmax of blocks [start, stop)."""
        if not isinstance(self.absmax, NestedAbsmax):
            return self.absmax[start:stop]
        nested = self.absmax
        group = torch.arange(start, stop, device=self.device) // NESTED_BLOCK
        scale = nested.map[nested.codes[start:stop].int()] * nested.absmax[group]
        return scale + nested.offset

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K], decoding no more than the blocks they touch."""
        in_features = self.out_shape[1]
        first, last = start * in_features, stop * in_features
        block = self.block_size
        first_block, last_block = first // block, -(-last // block)
        packed = self.codes[first_block * block // 2 : -(-last_block * block // 2)]
        values = torch.stack((self.table[(packed >> 4).int()], self.table[(packed & 15).int()]), -1)
        values = values.view(-1)
        # The last block of the weight may be short.
        missing = (last_block - first_block) * block - values.numel()
        if missing > 0:
            values = torch.nn.functional.pad(values, (0, missing))
        values = values.view(-1, block) * self.scales(first_block, last_block)[:, None]
        offset = first - first_block * block
        tile = values.view(-1)[offset : offset + last - first]
        return tile.view(stop - start, in_features).to(dtype or self.out_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K] in `dtype` (default: the dtype before quantization)."""
        return self.rows(0, self.out_shape[0], dtype)

    def to(self, device: torch.device) -> "NF4":
        absmax = self.absmax
        if isinstance(absmax, NestedAbsmax):
            absmax = replace(
                absmax,
                codes=absmax.codes.to(device),
                absmax=absmax.absmax.to(device),
                map=absmax.map.to(device),
            )
        else:
            absmax = absmax.to(device)
        return replace(
            self, codes=self.codes.to(device), absmax=absmax, table=self.table.to(device)
        )
