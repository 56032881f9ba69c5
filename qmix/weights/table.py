"""Table weights: 4-bit codes that stand for the 16 values of a table, with one scale per block.

NF4 and FP4 of bitsandbytes, E2M1 of NVFP4 and MXFP4, and llama.cpp's IQ types are all that. Shape
letters: see qmix.kernels; B here are the blocks of a weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qmix.weights import scales as scale_values
from qmix.weights.scales import NestedScales, Scales
from qmix.weights.scheme import Scheme
from qmix.weights.slabs import DEVICE_ELEMENTS, SERIAL_ELEMENTS, TILE_ELEMENTS, decoded

TableKind = Literal["nf4", "fp4", "e2m1", "iq4", "iq3_xxs", "iq3_s", "iq2", "iq1"]


# The value of each NF4 code: quantiles of the normal distribution (QLoRA, arXiv 2305.14314,
# appendix E), with the digits that bitsandbytes uses.
NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# The value of each FP4 code: a sign, then 0, 1/16, 8, 12, 4, 6, 2 and 3, all divided by 12, in
# float32 (bitsandbytes 0.50.2, functional.py, `get_4bit_type`). Minus zero is written as zero.
FP4_VALUES = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
    *(0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
    *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
)
# The value of each E2M1 code: a sign, two bits of exponent, one of mantissa (OCP Microscaling
# Formats v1.0, section 5.3.3). Minus zero is written as zero.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_E2M1, 0.0, *(-value for value in _E2M1[1:]))
# The value of each code of IQ4_NL and IQ4_XS (llama.cpp, ggml-common.h, `kvalues_iq4nl`).
IQ4_VALUES = (
    *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
    *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)
# What the weights of llama.cpp's grids can be, over their scale: a sign (8 of the code), and one of
# at most 8 magnitudes (gguf 0.19, quants.py, `grid_map`). IQ1: -1, 0 or 1, plus or minus an eighth,
# in eighths.
_IQ3_XXS = (4.0, 12.0, 20.0, 28.0, 36.0, 44.0, 52.0, 62.0)
_IQ3_S = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)
_IQ2 = (8.0, 25.0, 43.0, *(0.0,) * 5)
IQ1_VALUES = (-7.0, 1.0, 9.0, -9.0, -1.0, 7.0, *(0.0,) * 10)
VALUES: Mapping[TableKind, tuple[float, ...]] = {
    "nf4": NF4_VALUES,
    "fp4": FP4_VALUES,
    "e2m1": E2M1_VALUES,
    "iq4": IQ4_VALUES,
    "iq3_xxs": (*_IQ3_XXS, *(-value for value in _IQ3_XXS)),
    "iq3_s": (*_IQ3_S, *(-value for value in _IQ3_S)),
    "iq2": (*_IQ2, *(-value for value in _IQ2)),
    "iq1": IQ1_VALUES,
}


@dataclass(frozen=True, eq=False)
class Table:
    """A weight in 4-bit codes with one scale per block.

    The flattened weight is cut into blocks of `block_size` consecutive elements, which may straddle
    rows. Two codes share a byte: with `high_first`, as bitsandbytes stores them, elements `[a b | c
    d]` are the bytes `[ab cd]`, without it `[ba dc]`. The value is `table[code] * scale`, computed
    in float32 and rounded once to the requested dtype.

    Attributes:
        codes: uint8 [N * K / 2] (N * K rounded up to even).
        scales: B of them, flat or [N, G], plain or nested.
        table: float32 [16], the value of each code.
        out_shape: (N, K).
        out_dtype: the dtype of the weight before quantization; the default of `dequantize`.
        block_size: elements a block; a power of two from 16 on.
        kind: whose table it is.
    """

    codes: Tensor
    scales: Scales
    table: Tensor
    out_shape: tuple[int, int]
    out_dtype: torch.dtype
    block_size: int = 64
    kind: TableKind = "nf4"
    high_first: bool = True

    def __post_init__(self) -> None:
        assert self.table.shape == (16,)
        assert self.table.dtype == torch.float32
        assert self.block_size & (self.block_size - 1) == 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_shape

    @property
    def scheme(self) -> Scheme:
        nested = self.scales if isinstance(self.scales, NestedScales) else None
        bitsandbytes = self.kind in ("nf4", "fp4")
        return Scheme(
            kind=self.kind,
            block_size=self.block_size,
            double_quant=nested is not None,
            group_bits=None if bitsandbytes else scale_values.bits_of(self.scales),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.out_dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales; the constant tables are not counted."""
        return self.codes.nbytes + self.scales.nbytes

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
        pair = (high, low) if self.high_first else (low, high)
        return torch.stack(pair, 1).view(torch.int64).view(-1)

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
            out[first - start : last - start] = values.mul_(
                scale_values.floats(self.scales, first, last)[:, None]
            )
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
        scales = torch.split(scale_values.floats(self.scales, start, stop)[:, None], serial)
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

    def take(self, rows: Tensor) -> "Table":
        """The weight of some rows, int64 [n]; blocks must not straddle rows."""
        count, in_features = self.out_shape
        assert in_features % self.block_size == 0
        scales = scale_values.take(self.scales, rows, count)
        codes = self.codes.view(count, -1).index_select(0, rows).flatten()
        return replace(self, codes=codes, scales=scales, out_shape=(len(rows), in_features))

    def to(self, device: torch.device) -> "Table":
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            table=self.table.to(device),
        )
