"""NF4 and FP4: 4-bit codes of a table of 16 values, with one scale per block of weights.

Shape letters: see qmix.kernels; B here are the blocks of a weight.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qmix.weights.scheme import NESTED_BLOCK, Scheme
from qmix.weights.slabs import DEVICE_ELEMENTS, SERIAL_ELEMENTS, TILE_ELEMENTS, decoded

# The value of each NF4 code: quantiles of the normal distribution (QLoRA, arXiv 2305.14314,
# appendix E), with the digits that bitsandbytes uses.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


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
    """A weight in 4-bit codes with one absmax per block, in the layout of bitsandbytes.

    The flattened weight is cut into blocks of `block_size` consecutive elements. Two codes share a
    byte, the first in the high nibble: elements `[a b | c d]` are the bytes `[ab cd]`. The value is
    `table[code] * absmax[block]`, computed in float32 and rounded once to the requested dtype.

    Attributes:
        codes: uint8 [N * K / 2] (N * K rounded up to even).
        absmax: float32 [B], or NestedAbsmax.
        table: float32 [16], the value of each code.
        out_shape: (N, K).
        out_dtype: the dtype of the weight before quantization; the default of `dequantize`.
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
        first, last = start // NESTED_BLOCK, -(-stop // NESTED_BLOCK)
        group = nested.absmax[first:last, None].expand(-1, NESTED_BLOCK).reshape(-1)
        group = group[start - first * NESTED_BLOCK :][: stop - start]
        scale = torch.index_select(nested.map, 0, nested.codes[start:stop].int())
        return scale.mul_(group).add_(nested.offset)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K]; decodes only the blocks that they touch.

        Where blocks straddle rows, the result is a view into the decoded blocks.
        """
        in_features = self.out_shape[1]
        first, last = start * in_features, stop * in_features
        blocks = first // self.block_size, -(-last // self.block_size)
        dtype = dtype or self.out_dtype
        if self.device.type == "cpu":
            values = decoded(*blocks, self.block_size, dtype, self._decode_slab).view(-1)
        else:
            values = self._decode(*blocks, dtype)
        offset = first - blocks[0] * self.block_size
        return values[offset : offset + last - first].view(stop - start, in_features)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K] in `dtype` (default: the dtype before quantization)."""
        return self.rows(0, self.out_shape[0], dtype)

    @cached_property
    def _pairs(self) -> Tensor:
        """The two float32 values of each byte in memory order: int64 [256]."""
        high, low = self.table.repeat_interleave(16), self.table.repeat(16)
        return torch.stack((high, low), 1).view(torch.int64).view(-1)

    def _decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The values of blocks [start, stop), on any device; the last is padded with zeros."""
        block = self.block_size
        out = torch.empty(stop - start, block, dtype=dtype, device=self.device)
        step = DEVICE_ELEMENTS // block
        for first in range(start, stop, step):
            last = min(first + step, stop)
            packed = self.codes[first * block // 2 : last * block // 2]
            pairs = torch.index_select(self._pairs, 0, packed.int())
            short = (last - first) * block // 2 - packed.numel()
            values = torch.nn.functional.pad(pairs, (0, short)).view(torch.float32).view(-1, block)
            out[first - start : last - start] = values.mul_(self.scales(first, last)[:, None])
        return out.view(-1)

    def _decode_slab(self, start: int, stop: int, out: Tensor) -> None:
        """Decode blocks [start, stop) into `out` [B, block], one tile in the cache at a time.

        numpy looks up the two values of a byte faster than any torch operation. It uses one thread
        for each call and releases the interpreter's lock.
        """
        block = self.block_size
        codes, pairs = self.codes.numpy(), self._pairs.numpy()
        step, serial = TILE_ELEMENTS // block, SERIAL_ELEMENTS // block
        in_place = out.dtype == torch.float32
        buffer = out if in_place else torch.empty(min(step, stop - start), block)
        looked_up = buffer.numpy().reshape(-1).view(np.int64)
        # One call multiplies or rounds a list of parts on this thread, with the lock released.
        scales = torch.split(self.scales(start, stop)[:, None], serial)
        targets, parts = torch.split(out, serial), torch.split(buffer, serial)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            packed = codes[first * block // 2 : last * block // 2]
            values = looked_up[(first - start) * block // 2 :] if in_place else looked_up
            np.take(pairs, packed, out=values[: packed.size], mode="clip")
            values[packed.size : (last - first) * block // 2] = 0  # the last block may be short
            tile = slice((first - start) // serial, -(-(last - start) // serial))
            if in_place:
                torch._foreach_mul_(targets[tile], scales[tile])
                continue
            if last - first < len(buffer):
                parts = torch.split(buffer[: last - first], serial)
            torch._foreach_mul_(parts, scales[tile])
            torch._foreach_copy_(targets[tile], parts)

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


# The value of each FP4 code: a sign, then 0, 1/16, 8, 12, 4, 6, 2 and 3, all divided by 12, in
# float32 (bitsandbytes 0.50.2, functional.py, `get_4bit_type`). Minus zero is written as zero.
FP4_VALUES = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
    *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
    *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
)


@dataclass(frozen=True, eq=False)
class FP4(NF4):
    """A weight in 4-bit floats with one absmax per block: NF4 with `FP4_VALUES` as its table."""

    @property
    def scheme(self) -> Scheme:
        return replace(super().scheme, kind="fp4")
