"""Int4 and Int8: weights in small integers with one scale, and maybe one zero, per group of inputs.

Shape letters: see qmix.kernels; G here are the groups of a row, of K / G inputs each.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.weights.scheme import GROUP_SIZES, Scheme
from qmix.weights.slabs import DEVICE_ELEMENTS, SERIAL_ELEMENTS, TILE_ELEMENTS, decoded


def symmetric_zero(bits: int) -> int:
    """The zero of every group of a symmetric weight: 8 for 4 bits, 128 for 8."""
    return 1 << bits - 1


@dataclass(frozen=True, eq=False)
class Integers:
    """A weight in integers of `bits` bits: `value = (code - zero) * scale`, per group of inputs.

    The value is computed in float32 and rounded once to the requested dtype. Rows lie one after
    another, so a tile of outputs is one run of bytes. The codes of four bytes form a little-endian
    32-bit word with the first input lowest: the words of compressed-tensors unchanged, those of
    GPTQ transposed.

    Attributes:
        codes: uint8 [N, K * bits / 8].
        scales: float16, bfloat16 or float32 [N, G]; their dtype is the default of `dequantize`.
        zeros: uint8 [N, G], in codes; None is half of the range everywhere (symmetric).
        perm: int32 [K]; the j-th stored input is input `perm[j]` of the layer, so that the inputs
            of a group are neighbours even where an act-order file scatters them. None is the
            identity.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    perm: Tensor | None = None

    bits: ClassVar[Literal[4, 8]]
    kind: ClassVar[Literal["int4", "int8"]]

    @classmethod
    def packed(cls, codes: Tensor) -> Tensor:
        """Codes uint8 [N, K] -> uint8 [N, K * bits / 8], the layout of `codes`."""
        raise NotImplementedError

    @classmethod
    def reordered(cls, packed: Tensor, order: Tensor) -> Tensor:
        """Packed codes on the CPU, inputs permuted: the j-th is the given `order[j]`-th."""
        raise NotImplementedError

    def _floats(self, packed: Tensor) -> Tensor:
        """Packed rows on any device -> float32 [rows, K]: codes, minus the zero if symmetric."""
        raise NotImplementedError

    def _floats_into(self, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """`_floats` on the CPU, into memory of the caller."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def group_inputs(self) -> int:
        """Inputs a group: K / G."""
        return self.shape[1] // self.scales.shape[1]

    @property
    def scheme(self) -> Scheme:
        size = self.group_inputs if self.group_inputs in GROUP_SIZES else -1
        return Scheme(kind=self.kind, group_size=size, symmetric=self.zeros is None)

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and permutation."""
        parts = (self.codes, self.scales, self.zeros, self.perm)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K], inputs in the layer's order."""
        dtype = dtype or self.dtype
        if self.device.type == "cpu":
            values = decoded(start, stop, self.shape[1], dtype, self._decode_slab)
        else:
            values = self._decode(start, stop, dtype)
        return values if self.perm is None else values.index_select(1, self._inverse)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K] in `dtype` (default: that of the scales)."""
        return self.rows(0, self.shape[0], dtype)

    def to(self, device: torch.device) -> Self:
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            perm=None if self.perm is None else self.perm.to(device),
        )

    @cached_property
    def _inverse(self) -> Tensor:
        """The stored position of each input of the layer, int64 [K]."""
        assert self.perm is not None
        return torch.argsort(self.perm)

    def _decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) in stored order, on any device."""
        in_features, groups = self.shape[1], self.scales.shape[1]
        out = torch.empty(stop - start, in_features, dtype=dtype, device=self.device)
        step = max(1, DEVICE_ELEMENTS // in_features)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = self._floats(self.codes[first:last]).view(last - first, groups, -1)
            if self.zeros is not None:
                values -= self.zeros[first:last, :, None]
            values *= self.scales[first:last, :, None].float()
            out[first - start : last - start] = values.view(last - first, -1)
        return out

    def _decode_slab(self, start: int, stop: int, out: Tensor) -> None:
        """Decode rows [start, stop) into `out`, one tile that fits the cache at a time."""
        in_features, groups = self.shape[1], self.scales.shape[1]
        codes = self.codes[start:stop].numpy()
        scales = self.scales[start:stop].float().numpy()[:, :, None]
        zeros = None if self.zeros is None else self.zeros[start:stop].float().numpy()[:, :, None]
        step = min(max(1, TILE_ELEMENTS // in_features), stop - start)
        buffer = np.empty((step, in_features), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, stop - start, step):
                last = min(first + step, stop - start)
                part = buffer[: last - first]
                self._floats_into(codes[first:last], part)
                values = part.reshape(last - first, groups, -1)
                if zeros is not None:
                    np.subtract(values, zeros[first:last], out=values)
                target = out[first:last].view(-1)
                if out.dtype == torch.float32:
                    np.multiply(
                        values, scales[first:last], out=target.numpy().reshape(values.shape)
                    )
                    continue
                np.multiply(values, scales[first:last], out=values)
                flat = torch.from_numpy(values.reshape(-1))
                # One call rounds a list of parts on this thread, with the lock released.
                torch._foreach_copy_(
                    torch.split(target, SERIAL_ELEMENTS), torch.split(flat, SERIAL_ELEMENTS)
                )


_REORDERED_ROWS = 64  # seven times as fast as 1024: the gathered rows stay in the cache


@dataclass(frozen=True, eq=False)
class Int4(Integers):
    """A weight in 4-bit integers; a symmetric one has zeros of 8.

    Two codes share a byte, the first in the low nibble: inputs `[a b | c d]` of an output are the
    bytes `[ba dc]`.
    """

    bits: ClassVar[Literal[4, 8]] = 4
    kind: ClassVar[Literal["int4", "int8"]] = "int4"

    @classmethod
    def packed(cls, codes: Tensor) -> Tensor:
        """uint8 [N, K] of 0 to 15 -> uint8 [N, K / 2]."""
        return pack_codes(codes)

    @classmethod
    def reordered(cls, packed: Tensor, order: Tensor) -> Tensor:
        """See `reorder_codes`."""
        return reorder_codes(packed, order)

    @cached_property
    def _pairs(self) -> Tensor:
        """The two float32 values of each byte, before scaling, in memory order: int64 [256]."""
        code = torch.arange(16, dtype=torch.float32, device=self.device)
        if self.zeros is None:
            code -= symmetric_zero(self.bits)
        low, high = code.repeat(16), code.repeat_interleave(16)
        return torch.stack((low, high), 1).view(torch.int64).view(-1)

    def _floats(self, packed: Tensor) -> Tensor:
        pairs = torch.index_select(self._pairs, 0, packed.reshape(-1).int())
        return pairs.view(torch.float32).view(len(packed), -1)

    def _floats_into(self, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        np.take(self._pairs.numpy(), packed, out=out.view(np.int64), mode="clip")


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 [N, K] of 0 to 15 -> uint8 [N, K / 2], the layout of `Int4.codes`."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K]."""
    return torch.stack((packed & 15, packed >> 4), -1).view(packed.shape[0], -1)


def reorder_codes(packed: Tensor, order: Tensor) -> Tensor:
    """Permute the inputs of packed codes [N, K / 2] on the CPU: the j-th is the `order[j]`-th."""
    codes, index = packed.numpy(), order.long().numpy()
    (low, high), (low_shift, high_shift) = (
        (which[0::2], which[1::2]) for which in (index // 2, (index % 2 * 4).astype(np.uint8))
    )
    out = np.empty_like(codes)
    for start in range(0, len(codes), _REORDERED_ROWS):
        rows = codes[start : start + _REORDERED_ROWS]
        first = np.take(rows, low, axis=1) >> low_shift & 15
        out[start : start + len(rows)] = first | np.take(rows, high, axis=1) >> high_shift << 4
    return torch.from_numpy(out)


@dataclass(frozen=True, eq=False)
class Int8(Integers):
    """A weight in 8-bit integers, one byte a code; a symmetric one has zeros of 128."""

    bits: ClassVar[Literal[4, 8]] = 8
    kind: ClassVar[Literal["int4", "int8"]] = "int8"

    @classmethod
    def packed(cls, codes: Tensor) -> Tensor:
        """uint8 [N, K]: a code is a byte."""
        return codes

    @classmethod
    def reordered(cls, packed: Tensor, order: Tensor) -> Tensor:
        """Codes [N, K] with their inputs permuted: the j-th is the given `order[j]`-th."""
        return packed.index_select(1, order)

    def _floats(self, packed: Tensor) -> Tensor:
        return packed.float().sub_(self._shift)

    def _floats_into(self, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        # numpy vectorizes this conversion: a third of the time of a look-up, which Int4 needs.
        np.subtract(packed, np.float32(self._shift), out=out)

    @property
    def _shift(self) -> int:
        return symmetric_zero(self.bits) if self.zeros is None else 0
