"""A weight's rows as packing wants them: four-bit codes, and a scale and a zero for every tile.

Tables are renumbered, integers of fewer bits widened, nested scales and biases brought into plain
scales and zeros. Knows nothing of bytes. Shape letters: see qmix.kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qmix.weights import scales as scale_values
from qmix.weights.affine import Affine, pack_codes, symmetric_zero, unpack_codes
from qmix.weights.dense import Weight
from qmix.weights.packed.codes import INT4_ZERO, TABLES
from qmix.weights.packed.packed_shapes import MatrixSpec
from qmix.weights.packed.tile_format import TileFormat, refusal
from qmix.weights.table import VALUES, Table

_BITS = 4  # of a packed code
CHUNK_ELEMENTS = 1 << 22  # of codes that are translated at a time: 16 MiB of indices
_LARGEST_SHIFT = 32768  # of float16


@dataclass(frozen=True, eq=False)
class Plane:
    """The rows of one plane before packing.

    Attributes:
        codes: uint8 [rows, K], numbered as in the packed layout.
        scales: float32 [rows, K / C].
        zeros: float32 [rows, K / C], 8 minus the zero; None if symmetric.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def select(self, rows: Tensor) -> "Plane":
        zeros = None if self.zeros is None else self.zeros[rows]
        return Plane(self.codes[rows], self.scales[rows], zeros)

    def join(self, other: "Plane") -> "Plane":
        zeros = None
        if self.zeros is not None and other.zeros is not None:
            zeros = torch.cat((self.zeros, other.zeros))
        codes = torch.cat((self.codes, other.codes))
        return Plane(codes, torch.cat((self.scales, other.scales)), zeros)


def group_of(weight: Weight) -> int:
    """Consecutive inputs of a row that share a scale."""
    if isinstance(weight, Table):
        return weight.block_size
    assert isinstance(weight, Affine)
    return weight.group_inputs


def perm_of(weight: Weight) -> Tensor | None:
    return weight.perm if isinstance(weight, Affine) else None


def spec_of(weight: Weight) -> MatrixSpec:
    """What decides how a weight is packed, if it can be packed."""
    scheme = weight.scheme
    group, scale_bytes, symmetric = 1, 4, True
    if isinstance(weight, Affine):
        group, symmetric = weight.group_inputs, weight.symmetric
        scale_bytes = weight.scales.itemsize if isinstance(weight.scales, Tensor) else 0
    elif isinstance(weight, Table):
        group = weight.block_size
    plain = scheme.group_bits is None or isinstance(weight, Table)
    return MatrixSpec(scheme.kind, weight.shape, group, symmetric, scale_bytes, plain)


def check_table(weight: Weight, where: str) -> None:
    """Raise unless the codes stand for the values that the kernels know."""
    if isinstance(weight, Table) and weight.table.tolist() != list(VALUES[weight.kind]):
        expected = f"the values of {weight.kind}"
        raise refusal("no packed layout for another table", where, expected, "others")


def same_order(perm: Tensor | None, other: Tensor | None) -> bool:
    """Whether two weights store their inputs in the same order."""
    if perm is None or other is None:
        return perm is other
    return torch.equal(perm, other)


def plane_of(weight: Weight, tile_format: TileFormat) -> Plane:
    """The rows of a weight, with a scale for every tile."""
    repeats = group_of(weight) // tile_format.inputs
    if isinstance(weight, Table):
        blocks = codes_of(weight).numel() // weight.block_size
        scales = scale_values.floats(weight.scales, 0, blocks).view(weight.shape[0], -1)
        codes = translated(codes_of(weight), TABLES[weight.kind].stored_of_code)
        return Plane(codes, scales.repeat_interleave(repeats, 1), None)
    assert isinstance(weight, Affine)
    scales, zeros = _floats(weight, weight.scales), _shifts(weight)
    if zeros is not None:
        zeros = zeros.repeat_interleave(repeats, 1)
    codes = unpack_codes(weight.codes, weight.bits)
    if weight.bits != _BITS:
        codes += _widening(weight.bits)
    return Plane(codes, scales.repeat_interleave(repeats, 1), zeros)


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

    None if symmetric.

    Raises:
        UnsupportedError: a group's values are no multiple of its scale, which is too small or 0.
    """
    half = symmetric_zero(weight.bits)
    if weight.zeros is not None:
        return half - _floats(weight, weight.zeros)
    if weight.biases is None:
        return None
    scales, biases = _floats(weight, weight.scales), _floats(weight, weight.biases)
    shifts = half + torch.where(biases == 0, 0, biases / scales)
    if not bool((shifts.abs() <= _LARGEST_SHIFT).all()):
        raise refusal(
            "no packed layout for groups that are almost constant",
            "the weight",
            f"biases of at most {_LARGEST_SHIFT} scales",
            "larger ones",
        )
    return shifts


def _widening(bits: int) -> int:
    """What is added to codes of fewer bits, so that half of their range is 8."""
    return INT4_ZERO - symmetric_zero(bits)


def has_free_zeros(weight: Weight) -> bool:
    """Whether zeros are no codes."""
    if not isinstance(weight, Affine):
        return False
    return weight.biases is not None or (
        weight.zeros is not None and weight.zeros.dtype != torch.uint8
    )


def with_codes_of(template: Weight, unpacked: Weight) -> Weight:
    """A weight that was packed, bit for bit: its codes from the blob, all else from `template`."""
    codes: Tensor
    if isinstance(template, Table):
        assert isinstance(unpacked, Table)
        codes = unpacked.codes
        if not template.high_first:
            codes = codes << 4 | codes >> 4
        return replace(template, codes=codes)
    assert isinstance(template, Affine)
    assert isinstance(unpacked, Affine)
    codes = unpacked.codes
    if template.bits != _BITS:
        codes = pack_codes(unpack_codes(codes) - _widening(template.bits), template.bits)
    return replace(template, codes=codes)


def translated(codes: Tensor, numbers: Sequence[int]) -> Tensor:
    """Each code's new number, uint8 [N, K]; a chunk at a time, since an index takes four bytes."""
    table = torch.tensor(numbers, dtype=torch.uint8, device=codes.device)
    out = torch.empty_like(codes)
    flat = torch.split(codes.view(-1), CHUNK_ELEMENTS), torch.split(out.view(-1), CHUNK_ELEMENTS)
    for source, target in zip(*flat, strict=True):
        torch.index_select(table, 0, source.int(), out=target)
    return out
