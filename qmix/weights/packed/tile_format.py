"""The packed layout in numbers: how a matrix is cut into tiles, and how many bytes it takes.

weights.packed.layout describes the layout itself. Knows no torch. Shape letters: see qmix.kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qmix.errors import UnsupportedError
from qmix.weights.packed.bit_slices import SLICED_INPUTS, SLICES

if TYPE_CHECKING:  # needs torch
    from qmix.weights.table import TableKind

PANEL = 128  # rows
BYTE_ROWS = PANEL // 2
HEADER_BYTES = 128
SMALLEST_GROUP = 16  # inputs of a matrix instruction
# Inputs of a tile, the widest first. Codes of eight bits, and groups of 16, take more registers.
_TILE_INPUTS = (128, 64, 32)
_FEW_INPUTS = (64, 32)
_SLICED_GROUPS = (SLICED_INPUTS, 64, 32, SMALLEST_GROUP)
TileKind = Literal["nf4", "fp4", "e2m1", "iq4", "int2", "int3", "int4", "int5", "int6", "int8"]
# What integers are packed as where slices of their bits do not fit.
_WIDENED: Mapping[TileKind, TileKind] = {
    "int2": "int4",
    "int3": "int4",
    "int5": "int8",
    "int6": "int8",
}
_TABLES: Mapping[TileKind, "TableKind"] = {"nf4": "nf4", "fp4": "fp4", "e2m1": "e2m1", "iq4": "iq4"}


@dataclass(frozen=True)
class TileFormat:
    """What a tile holds.

    Attributes:
        kind: how its codes are stored.
        inputs: C, 32, 64 or 128.
        symmetric: whether it has no zeros.
        group: so many weights of a row share a scale: 16, of sliced codes also 32 or 64, or 0 for
            all inputs of the tile.
        own_table: the codes stand for values that the matrix brings with it, not for those of its
            kind.
    """

    kind: TileKind
    inputs: int
    symmetric: bool = True
    group: int = 0
    own_table: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.kind[3:]) if self.kind.startswith("int") else 4

    @property
    def sliced(self) -> bool:
        """Whether codes are cut into slices of bits, see bit_slices."""
        return self.bits in SLICES

    @property
    def scales_weights(self) -> bool:
        """Whether weights are multiplied by their scale in float16, and not sums by it after."""
        return self.group == SMALLEST_GROUP

    @property
    def table(self) -> "TableKind | None":
        """Whose table the codes are looked up in; None of integers."""
        return _TABLES.get(self.kind)

    @property
    def group_inputs(self) -> int:
        """Weights of a row of the tile that share a scale."""
        return self.group or self.inputs

    @property
    def code_bytes(self) -> int:
        return PANEL * self.inputs * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of a tile's scales, and as many of its zeros."""
        return PANEL * 2 * (self.inputs // self.group_inputs)

    @property
    def tile_bytes(self) -> int:
        return self.code_bytes + self.scale_bytes * (1 if self.symmetric else 2)

    def __str__(self) -> str:
        own, group = "own " if self.own_table else "", f" g{self.group}" if self.group else ""
        return f"{own}{self.kind} {self.inputs}{group}{'' if self.symmetric else ' asymmetric'}"

    def matrix_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix [N, K], header included."""
        return HEADER_BYTES + shape[0] // PANEL * (shape[1] // self.inputs) * self.tile_bytes


def tile_format(
    kind: TileKind,
    shape: tuple[int, int],
    *,
    group: int,
    symmetric: bool = True,
    own_table: bool = False,
    rows: int = PANEL,
    where: str = "the weight",
) -> TileFormat:
    """The tile format of a matrix [N, K].

    Codes of 2, 3, 5 and 6 bits are widened to 4 or 8 where K is no multiple of 128.

    Args:
        group: consecutive weights that share a scale; of a table's they may straddle rows.
        rows: the number that N must be a multiple of.
        where: the matrix, for errors.

    Raises:
        UnsupportedError: N is no multiple of `rows`, K no multiple of 32, or the group none of 16.
    """
    out_features, in_features = shape
    if out_features % rows:
        raise refusal(
            "no packed layout for this shape", where, f"a multiple of {rows} outputs", out_features
        )
    sliced = _sliced(kind, in_features, group, symmetric)
    if sliced is not None:
        return sliced
    kind = _WIDENED.get(kind, kind)
    of_16 = group % 32 == SMALLEST_GROUP
    sizes = _FEW_INPUTS if of_16 or kind == "int8" else _TILE_INPUTS
    inputs = next((n for n in sizes if in_features % n == 0 and (of_16 or group % n == 0)), None)
    if inputs is None:
        raise refusal(
            "no packed layout for this shape",
            where,
            f"a multiple of 32 inputs, in groups of a multiple of {SMALLEST_GROUP}",
            f"{in_features} inputs in groups of {group}",
        )
    return TileFormat(kind, inputs, symmetric, SMALLEST_GROUP if of_16 else 0, own_table)


def _sliced(kind: TileKind, in_features: int, group: int, symmetric: bool) -> TileFormat | None:
    """The format of slices of bits; None if codes have four or eight bits, or it does not fit."""
    found = TileFormat(kind, SLICED_INPUTS, symmetric)
    shared = next((size for size in _SLICED_GROUPS if group % size == 0), None)
    if not found.sliced or in_features % SLICED_INPUTS or shared is None:
        return None
    return replace(found, group=0 if shared == SLICED_INPUTS else shared)


def refusal(what: str, where: str, expected: object, found: object) -> UnsupportedError:
    """The error of a weight that has no packed layout."""
    return UnsupportedError(
        what,
        where=where,
        expected=expected,
        found=found,
        remedy="The fallback kernel multiplies such a weight.",
    )
