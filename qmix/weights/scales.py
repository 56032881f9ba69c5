"""Scales: one number for each group of a weight, plain or nested.

Plain scales are a tensor of floats. Nested ones are small codes, looked up in a table and
multiplied by an outer scale that many share: bitsandbytes' double quantization, the E4M3 and E8M0
scales of NVFP4 and MXFP4, and the six bits of k-quants are all that. Biases are stored like scales.

Knows nothing of a weight's codes. Shape letters: see qmix.kernels; B here are a weight's groups.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# Codes of six bits: four in three bytes, the first in the lowest bits.
_PACKED_CODES = 4
_PACKED_BYTES = 3


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Scales in codes: `map[code] * outer[i // block] + offset`, computed in float32.

    Attributes:
        codes: uint8; of 8 bits [B] or [N, G], of 6 bits [N, G * 3 / 4], four in three bytes.
        outer: float32 or float16 [ceil(B / block)].
        map: float32 [2^bits], the value of each code.
        offset: added to every scale.
        block: consecutive scales that share an outer scale.
        bits: of a code, 8 or 6.
    """

    codes: Tensor
    outer: Tensor
    map: Tensor
    offset: float = 0.0
    block: int = 256
    bits: int = 8

    def __post_init__(self) -> None:
        assert self.bits in (6, 8)
        assert self.map.numel() == 1 << self.bits
        assert self.bits == 8 or self.codes.shape[-1] % _PACKED_BYTES == 0
        assert self.outer.numel() == -(-len(self) // self.block), (self.outer.shape, len(self))

    def __len__(self) -> int:
        """B."""
        return self.codes.numel() * 8 // self.bits

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scales that the codes stand for."""
        *rows, last = self.codes.shape
        return (*rows, last * 8 // self.bits)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @cached_property
    def line(self) -> tuple[float, float]:
        """(start, step) if `map[code]` is `start + code * step` in float32, as of k-quants.

        The step of any other map is 0.
        """
        start, step = self.map[0], self.map[1] - self.map[0]
        codes = torch.arange(len(self.map), device=self.device)
        even = torch.equal(self.map, start + codes * step)
        return (float(start), float(step)) if even else (0.0, 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and outer scales; the constant table is not counted."""
        return self.codes.nbytes + self.outer.nbytes

    def floats(self, start: int, stop: int) -> Tensor:
        """Scales [start, stop) of all, float32."""
        first, last = start // self.block, -(-stop // self.block)
        outer = self.outer[first:last].float()
        if last - first > 1:
            repeated = outer[:, None].expand(-1, self.block).reshape(-1)
            outer = repeated[start - first * self.block :][: stop - start]
        scale = torch.index_select(self.map, 0, self._codes(start, stop).int())
        return scale.mul_(outer).add_(self.offset)

    def _codes(self, start: int, stop: int) -> Tensor:
        codes = self.codes.view(-1)
        if self.bits == 8:
            return codes[start:stop]
        first, last = start // _PACKED_CODES, -(-stop // _PACKED_CODES)
        words = codes[first * _PACKED_BYTES : last * _PACKED_BYTES]
        skipped = start - first * _PACKED_CODES
        return unpack_six_bits(words)[skipped : skipped + stop - start]

    def to(self, device: torch.device) -> "NestedScales":
        return replace(
            self,
            codes=self.codes.to(device),
            outer=self.outer.to(device),
            map=self.map.to(device),
        )


Scales = Tensor | NestedScales


def floats(scales: Scales, start: int, stop: int) -> Tensor:
    """Scales [start, stop) of all, float32 and flat."""
    if isinstance(scales, NestedScales):
        return scales.floats(start, stop)
    return scales.reshape(-1)[start:stop].float()


def bits_of(scales: Scales) -> float:
    """Bits that a scale takes, its share of an outer scale included."""
    if not isinstance(scales, NestedScales):
        return 8.0 * scales.itemsize
    outer = 0.0 if scales.outer.numel() == 1 else 8.0 * scales.outer.itemsize / scales.block
    return scales.bits + outer


def take(scales: Scales, rows: Tensor, count: int) -> Scales:
    """Scales of `count` rows -> those of some rows, [n, G].

    Nested ones become plain where rows share an outer scale.
    """
    if not isinstance(scales, NestedScales):
        return scales.reshape(count, -1).index_select(0, rows)
    codes = scales.codes.view(count, -1).index_select(0, rows)
    groups = len(scales) // count
    if scales.outer.numel() == 1:
        return replace(scales, codes=codes, block=max(scales.block, len(rows) * groups))
    if groups % scales.block == 0:
        outer = scales.outer.view(count, -1).index_select(0, rows).flatten()
        return replace(scales, codes=codes, outer=outer)
    return scales.floats(0, len(scales)).view(count, groups).index_select(0, rows)


def pack_six_bits(codes: Tensor) -> Tensor:
    """uint8 [..., 4 n] of 0 to 63 -> uint8 [..., 3 n]."""
    a, b, c, d = codes.view(*codes.shape[:-1], -1, _PACKED_CODES).unbind(-1)
    packed = torch.stack((a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2), -1)
    return packed.flatten(-2)


def unpack_six_bits(packed: Tensor) -> Tensor:
    """uint8 [..., 3 n] -> uint8 [..., 4 n]: the inverse of `pack_six_bits`."""
    a, b, c = packed.view(*packed.shape[:-1], -1, _PACKED_BYTES).unbind(-1)
    codes = torch.stack((a & 63, a >> 6 | b << 2 & 63, b >> 4 | c << 4 & 63, c >> 2), -1)
    return codes.flatten(-2)
