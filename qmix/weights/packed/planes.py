"""A weight's rows as packing wants them: codes, and a scale and a zero for every group.

Tables are renumbered, integers widened if the tile's codes have more bits, nested scales and biases
brought into plain scales and zeros. Knows nothing of bytes. Shape letters: see qmix.kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.weights import scales as scale_values
from qmix.weights.affine import Affine, pack_codes, symmetric_zero, unpack_codes
from qmix.weights.dense import Weight
from qmix.weights.packed.codes import HALF_RANGE, TABLES, StoredTable, own_table
from qmix.weights.packed.packed_shapes import MatrixSpec
from qmix.weights.packed.tile_format import TileFormat
from qmix.weights.table import VALUES, Table, TableKind

CHUNK_ELEMENTS = 1 << 22  # of codes that are translated at a time: 16 MiB of indices
_LARGEST_SHIFT = 32768  # of float16, which is exact to 2^-11 of that
_INTEGER_TABLES: tuple[TableKind, ...] = ("iq4", "iq3_xxs", "iq3_s", "iq2", "iq1")
# The code of eight bits of each value of a table of integers.
_INTEGER_CODES: Mapping[TableKind, tuple[int, ...]] = {
    kind: tuple(int(value) + HALF_RANGE["int8"] for value in VALUES[kind])
    for kind in _INTEGER_TABLES
}


@dataclass(frozen=True, eq=False)
class Plane:
    """The rows of one plane before packing.

    Attributes:
        codes: uint8 [rows, K], numbered as in the packed layout.
        scales: float32 [rows, K / inputs of a group].
        zeros: float32 like `scales`, half of the codes' range minus the zero; None if symmetric.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def select(self, rows: Tensor) -> "Plane":
        zeros = None if self.zeros is None else self.zeros[rows]
        return Plane(self.codes[rows], self.scales[rows], zeros)

    @classmethod
    def joined(cls, planes: Sequence["Plane"]) -> "Plane":
        """The rows of all of them."""
        if len(planes) == 1:
            return planes[0]
        zeros = [plane.zeros for plane in planes if plane.zeros is not None]
        return cls(
            torch.cat([plane.codes for plane in planes]),
            torch.cat([plane.scales for plane in planes]),
            torch.cat(zeros) if zeros else None,
        )

    def padded(self, rows: int) -> "Plane":
        """With rows of zeros behind its own."""
        more = rows - len(self.codes)
        if not more:
            return self
        zeros = None if self.zeros is None else F.pad(self.zeros, (0, 0, 0, more))
        return Plane(F.pad(self.codes, (0, 0, 0, more)), F.pad(self.scales, (0, 0, 0, more)), zeros)


def group_of(weight: Weight) -> int:
    """Consecutive weights that share a scale."""
    if isinstance(weight, Table):
        return weight.block_size
    assert isinstance(weight, Affine)
    return weight.group_inputs


def perm_of(weight: Weight) -> Tensor | None:
    return weight.perm if isinstance(weight, Affine) else None


def spec_of(weight: Weight) -> MatrixSpec:
    """What decides how a weight is packed, if it can be packed."""
    if isinstance(weight, Affine):
        own, symmetric, group = False, weight.symmetric, weight.group_inputs
    elif isinstance(weight, Table):
        own = weight.table.tolist() != list(VALUES[weight.kind])
        symmetric, group = True, weight.block_size
    else:
        own, symmetric, group = False, True, 1
    return MatrixSpec(weight.scheme.kind, weight.shape, group, symmetric, own)


def own_values(weight: Weight) -> Tensor | None:
    """The values of a table that is not that of its kind."""
    if isinstance(weight, Table) and spec_of(weight).own_table:
        return weight.table
    return None


def table_of(weight: Weight, tile_format: TileFormat) -> StoredTable | None:
    """The table that a weight's packed codes are looked up in; None of integers."""
    if tile_format.table is None:
        return None
    assert isinstance(weight, Table)
    return own_table(weight.table.tolist()) if tile_format.own_table else TABLES[weight.kind]


def equal_or_none(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether both are None, or the same on whatever device."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def plane_of(weight: Weight, tile_format: TileFormat) -> Plane:
    """The rows of a weight, with a scale for every group of a tile."""
    repeats = group_of(weight) // tile_format.group_inputs
    if isinstance(weight, Table):
        return _table_plane(weight, tile_format, repeats)
    assert isinstance(weight, Affine)
    scales, zeros = _floats(weight, weight.scales), _shifts(weight)
    if zeros is not None:
        scales, zeros = _within_range(scales, zeros, weight)
        zeros = zeros.repeat_interleave(repeats, 1)
    scales = scales.repeat_interleave(repeats, 1)
    codes = unpack_codes(weight.codes, weight.bits)
    widening = _widening(weight.bits, tile_format)
    if widening:
        codes = codes + widening
    if zeros is None and not tile_format.symmetric:
        zeros = torch.zeros_like(scales)
    return Plane(codes, scales, zeros)


def _table_plane(weight: Table, tile_format: TileFormat, repeats: int) -> Plane:
    """Blocks may straddle rows; groups of tiles do not."""
    rows, inputs = weight.shape
    groups = rows * inputs // tile_format.group_inputs
    scales = scale_values.floats(weight.scales, 0, -(-rows * inputs // weight.block_size))
    scales = scales.repeat_interleave(repeats)[:groups].view(rows, -1)
    stored = table_of(weight, tile_format)
    numbers = _INTEGER_CODES[weight.kind] if stored is None else stored.stored_of_code
    zeros = None if tile_format.symmetric else torch.zeros_like(scales)
    return Plane(translated(codes_of(weight), numbers), scales, zeros)


def codes_of(weight: Table) -> Tensor:
    """The codes of a table weight, uint8 [N, K]."""
    pairs = weight.codes.view(weight.shape[0], -1)
    high, low = pairs >> 4, pairs & 15
    both = (high, low) if weight.high_first else (low, high)
    return torch.stack(both, -1).view(weight.shape)


def _floats(weight: Affine, scales: scale_values.Scales) -> Tensor:
    """float32 [N, G]."""
    rows, groups = weight.shape[0], weight.groups
    return scale_values.floats(scales, 0, rows * groups).view(rows, groups)


def _shifts(weight: Affine) -> Tensor | None:
    """What is added to a group's codes minus half of their range, float32 [N, G].

    None if symmetric. Infinite where a group with a bias has no scale.
    """
    half = symmetric_zero(weight.bits)
    if weight.zeros is not None:
        return half - _floats(weight, weight.zeros)
    if weight.biases is None:
        return None
    scales, biases = _floats(weight, weight.scales), _floats(weight, weight.biases)
    return half + torch.where(biases == 0, 0, biases / scales)


def _within_range(scales: Tensor, shifts: Tensor, weight: Affine) -> tuple[Tensor, Tensor]:
    """Scales and shifts that float16 holds.

    The values of a group whose bias is more than 32768 scales are almost constant. It gets a larger
    scale, by which its values change by at most 2^-11 if codes have four bits, and 2^-7 of eight.
    """
    beyond = shifts.abs() > _LARGEST_SHIFT
    if not bool(beyond.any()):
        return scales, shifts
    assert weight.biases is not None
    limited = shifts.sign() * _LARGEST_SHIFT
    constant = _floats(weight, weight.biases) / limited
    return torch.where(beyond, constant, scales), torch.where(beyond, limited, shifts)


def _widening(bits: int, tile_format: TileFormat) -> int:
    """What is added to codes of fewer bits, so that half of their range is that of the tile's."""
    return HALF_RANGE[tile_format.kind] - symmetric_zero(bits)


def has_free_zeros(weight: Weight) -> bool:
    """Whether zeros are no codes."""
    if not isinstance(weight, Affine):
        return False
    return weight.biases is not None or (
        weight.zeros is not None and weight.zeros.dtype != torch.uint8
    )


def with_codes_of(template: Weight, unpacked: Weight, tile_format: TileFormat) -> Weight:
    """A weight that was packed, bit for bit: its codes from the blob, all else from `template`."""
    codes: Tensor
    if isinstance(template, Table):
        if isinstance(unpacked, Affine):
            codes = _table_codes(unpacked, template.kind)
        else:
            assert isinstance(unpacked, Table)
            codes = unpacked.codes
        if not template.high_first:
            codes = codes << 4 | codes >> 4
        return replace(template, codes=codes)
    assert isinstance(template, Affine)
    assert isinstance(unpacked, Affine)
    codes = unpacked.codes
    if template.bits != tile_format.bits:
        codes = unpack_codes(codes, tile_format.bits) - _widening(template.bits, tile_format)
        codes = pack_codes(codes, template.bits)
    return replace(template, codes=codes)


def _table_codes(unpacked: Affine, kind: TableKind) -> Tensor:
    """The pairs of codes of a table, high code first, that were packed as integers."""
    number = dict(zip(_INTEGER_CODES[kind], range(16), strict=True))
    codes = translated(unpacked.codes, [number.get(code, 0) for code in range(256)])
    return (codes[:, 0::2] << 4 | codes[:, 1::2]).flatten()


def translated(codes: Tensor, numbers: Sequence[int]) -> Tensor:
    """Each code's new number, uint8 [N, K]; a chunk at a time, since an index takes four bytes."""
    table = torch.tensor(numbers, dtype=torch.uint8, device=codes.device)
    out = torch.empty_like(codes)
    flat = torch.split(codes.view(-1), CHUNK_ELEMENTS), torch.split(out.view(-1), CHUNK_ELEMENTS)
    for source, target in zip(*flat, strict=True):
        torch.index_select(table, 0, source.int(), out=target)
    return out
