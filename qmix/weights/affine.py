"""Affine weights: codes of 2 to 6 or 8 bits, a scale and a zero or a bias per group of inputs.

Shape letters: see qmix.kernels; G here are the groups of a row, of K / G inputs each.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.weights import scales as scale_values
from qmix.weights.scales import NestedScales, Scales
from qmix.weights.scheme import GROUP_SIZES, Kind, Scheme
from qmix.weights.slabs import DEVICE_ELEMENTS, SERIAL_ELEMENTS, TILE_ELEMENTS, decoded

_KINDS: dict[int, Kind] = {
    2: "int2",
    3: "int3",
    4: "int4",
    5: "int5",
    6: "int6",
    8: "int8",
}


def symmetric_zero(bits: int) -> int:
    """The zero of every group of a symmetric weight: 8 for 4 bits, 128 for 8."""
    return 1 << bits - 1


@dataclass(frozen=True, eq=False)
class Affine:
    """A weight in integer codes: `(code - zero) * scale`, or `code * scale + bias`, per group.

    The value is computed in float32 and rounded once to the requested dtype. Rows lie one after
    another, so a tile of outputs is one run of bytes. The codes of a row are a little-endian stream
    of bits with the first input lowest: the words of compressed-tensors and MLX unchanged, those of
    GPTQ transposed. A row of codes of 5 or 6 bits is two streams, the lower four bits of each and
    then the upper ones, so that a kernel reads the first as codes of 4 bits.

    Attributes:
        codes: uint8 [N, K * bits / 8].
        scales: [N, G], plain (float16, bfloat16 or float32) or nested.
        zeros: [N, G] in codes, uint8 or a float; None if the weight has biases, or is symmetric:
            the zero is half of the range everywhere.
        perm: int32 [K]; the j-th stored input is input `perm[j]` of the layer, so that the inputs
            of a group are neighbours even where an act-order file scatters them. None is the
            identity.
        bits: of a code.
        biases: [N, G], plain or nested; None if the weight has zeros or is symmetric.
        out_dtype: the default of `dequantize`; None is that of plain scales, or of outer ones.
    """

    codes: Tensor
    scales: Scales
    zeros: Tensor | None = None
    perm: Tensor | None = None
    bits: int = 4
    biases: Scales | None = None
    out_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        assert self.zeros is None or self.biases is None
        assert self.codes.dtype == torch.uint8
        assert self.codes.dim() == 2
        assert self.bits in _KINDS
        assert self.codes.shape[1] * 8 % self.bits == 0
        for part in (self.zeros, self.biases):
            assert part is None or part.shape == self.scales.shape

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 8 // self.bits

    @property
    def groups(self) -> int:
        """G."""
        return self.scales.shape[1]

    @property
    def group_inputs(self) -> int:
        """Inputs a group: K / G."""
        return self.shape[1] // self.groups

    @property
    def symmetric(self) -> bool:
        """Whether every zero is half of the range."""
        return self.zeros is None and self.biases is None

    @property
    def scheme(self) -> Scheme:
        size = self.group_inputs
        if self.groups == 1 and size not in GROUP_SIZES:
            size = -1  # all inputs
        return Scheme(
            kind=_KINDS[self.bits],
            group_size=size,
            symmetric=self.symmetric,
            group_bits=self._group_bits,
        )

    @property
    def _group_bits(self) -> float | None:
        """Bits of a group beside its codes; None for a plain scale and a zero of a code's bits."""
        integer_zeros = self.zeros is None or self.zeros.dtype == torch.uint8
        if isinstance(self.scales, Tensor) and integer_zeros and self.biases is None:
            return None
        bits = scale_values.bits_of(self.scales)
        if self.biases is not None:
            return bits + scale_values.bits_of(self.biases)
        if self.zeros is None:
            return bits
        return bits + (self.bits if integer_zeros else 8 * self.zeros.itemsize)

    @property
    def dtype(self) -> torch.dtype:
        if self.out_dtype is not None:
            return self.out_dtype
        scales = self.scales
        return scales.outer.dtype if isinstance(scales, NestedScales) else scales.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros, biases and permutation."""
        parts = (self.codes, self.scales, self.zeros, self.biases, self.perm)
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

    def take(self, rows: Tensor) -> "Affine":
        """The weight of some rows, int64 [n]."""
        count = self.shape[0]
        biases = self.biases
        return replace(
            self,
            codes=self.codes.index_select(0, rows),
            scales=scale_values.take(self.scales, rows, count),
            zeros=None if self.zeros is None else self.zeros.index_select(0, rows),
            biases=None if biases is None else scale_values.take(biases, rows, count),
        )

    def to(self, device: torch.device) -> "Affine":
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            biases=None if self.biases is None else self.biases.to(device),
            perm=None if self.perm is None else self.perm.to(device),
        )

    @cached_property
    def _inverse(self) -> Tensor:
        """The stored position of each input of the layer, int64 [K]."""
        assert self.perm is not None
        return torch.argsort(self.perm)

    def _decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) in stored order, on any device."""
        in_features = self.shape[1]
        out = torch.empty(stop - start, in_features, dtype=dtype, device=self.device)
        step = max(1, DEVICE_ELEMENTS // in_features)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            values = self._floats(self.codes[first:last]).view(last - first, self.groups, -1)
            scales, zeros, biases = self._per_group(first, last)
            if zeros is not None:
                values -= zeros
            values *= scales
            if biases is not None:
                values += biases
            out[first - start : last - start] = values.view(last - first, -1)
        return out

    def _per_group(self, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Scales, zeros and biases of rows [start, stop), each float32 [stop - start, G, 1]."""
        first, last, shape = start * self.groups, stop * self.groups, (stop - start, self.groups, 1)
        parts = (
            None if part is None else scale_values.floats(part, first, last).view(shape)
            for part in (self.scales, self.zeros, self.biases)
        )
        scales, zeros, biases = parts
        assert scales is not None
        return scales, zeros, biases

    def _decode_slab(self, start: int, stop: int, out: Tensor) -> None:
        """Decode rows [start, stop) into `out`, one tile that fits the cache at a time."""
        in_features = self.shape[1]
        codes = self.codes[start:stop].numpy()
        group_scales, group_zeros, group_biases = self._per_group(start, stop)
        scales = group_scales.numpy()
        zeros = None if group_zeros is None else group_zeros.numpy()
        biases = None if group_biases is None else group_biases.numpy()
        step = min(max(1, TILE_ELEMENTS // in_features), stop - start)
        buffer = np.empty((step, in_features), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, stop - start, step):
                last = min(first + step, stop - start)
                part = buffer[: last - first]
                self._floats_into(codes[first:last], part)
                values = part.reshape(last - first, self.groups, -1)
                target = out[first:last].view(-1)
                in_place = out.dtype == torch.float32
                result = target.numpy().reshape(values.shape) if in_place else values
                if zeros is not None:
                    np.subtract(values, zeros[first:last], out=values)
                np.multiply(values, scales[first:last], out=result)
                if biases is not None:
                    np.add(result, biases[first:last], out=result)
                if in_place:
                    continue
                flat = torch.from_numpy(values.reshape(-1))
                # One call rounds a list of parts on this thread, with the lock released.
                torch._foreach_copy_(
                    torch.split(target, SERIAL_ELEMENTS), torch.split(flat, SERIAL_ELEMENTS)
                )

    @cached_property
    def _pairs(self) -> Tensor:
        """The two float32 values of each byte of 4-bit codes, in memory order: int64 [256]."""
        code = torch.arange(16, dtype=torch.float32, device=self.device) - self._shift
        low, high = code.repeat(16), code.repeat_interleave(16)
        return torch.stack((low, high), 1).view(torch.int64).view(-1)

    @property
    def _shift(self) -> int:
        """What is taken from every code before zeros: half of the range if symmetric."""
        return symmetric_zero(self.bits) if self.symmetric else 0

    def _floats(self, packed: Tensor) -> Tensor:
        """Packed rows on any device -> float32 [rows, K]: codes, minus the zero if symmetric."""
        if self.bits == 4:
            pairs = torch.index_select(self._pairs, 0, packed.reshape(-1).int())
            return pairs.view(torch.float32).view(len(packed), -1)
        return unpack_codes(packed, self.bits).float().sub_(self._shift)

    def _floats_into(self, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """`_floats` on the CPU, into memory of the caller."""
        if self.bits == 4:
            np.take(self._pairs.numpy(), packed, out=out.view(np.int64), mode="clip")
            return
        if self.bits != 8:
            packed = unpack_codes(torch.from_numpy(packed), self.bits).numpy()
        # numpy vectorizes this conversion: a third of the time of a look-up, which 4 bits need.
        np.subtract(packed, np.float32(self._shift), out=out)


def pack_codes(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes uint8 [N, K] -> uint8 [N, K * bits / 8], the layout of `Affine.codes`."""
    if bits == 8:
        return codes
    if bits == 4:
        return codes[:, 0::2] | codes[:, 1::2] << 4
    if bits > 4:
        return torch.cat((pack_codes(codes & 15), pack_codes(codes >> 4, bits - 4)), 1)
    octets = [torch.zeros_like(codes[:, ::8]) for _ in range(bits)]  # eight codes fill them
    for code, start in zip(
        codes.view(len(codes), -1, 8).unbind(-1), range(0, 64, bits), strict=False
    ):
        octet, shift = divmod(start, 8)
        octets[octet] |= code << shift
        if shift + bits > 8:
            octets[octet + 1] |= code >> 8 - shift
    return torch.stack(octets, -1).flatten(1)


def unpack_codes(packed: Tensor, bits: int = 4) -> Tensor:
    """uint8 [N, K * bits / 8] -> codes uint8 [N, K]: the inverse of `pack_codes`."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).view(packed.shape[0], -1)
    if bits > 4:
        lower, upper = packed.tensor_split((packed.shape[1] * 4 // bits,), 1)
        return unpack_codes(lower) | unpack_codes(upper, bits - 4) << 4
    octets = packed.view(packed.shape[0], -1, bits).unbind(-1)  # eight codes
    codes = []
    for start in range(0, 8 * bits, bits):
        octet, shift = divmod(start, 8)
        code = octets[octet] >> shift
        if shift + bits > 8:
            code |= octets[octet + 1] << 8 - shift
        codes.append(code & (1 << bits) - 1)
    return torch.stack(codes, -1).flatten(1)


_REORDERED_ROWS = 64  # seven times as fast as 1024: the gathered rows stay in the cache


def reorder_codes(packed: Tensor, order: Tensor, bits: int = 4) -> Tensor:
    """Permute the inputs of packed codes: the j-th is the `order[j]`-th."""
    if bits == 8:
        return packed.index_select(1, order)
    if bits != 4 or not packed.is_cpu:
        chunks = torch.split(packed, max(1, DEVICE_ELEMENTS // len(order)))
        reordered = (unpack_codes(chunk, bits).index_select(1, order) for chunk in chunks)
        return torch.cat([pack_codes(part, bits) for part in reordered])
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
