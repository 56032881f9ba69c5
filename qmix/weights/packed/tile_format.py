"""The packed layout in numbers: how a 4-bit matrix is cut into tiles, and how many bytes it takes.

weights.packed.layout describes the layout itself. Knows no torch. Shape letters: see qmix.kernels.
"""

from dataclasses import dataclass
from typing import Literal

from qmix.errors import UnsupportedError

PANEL = 128  # rows
BYTE_ROWS = PANEL // 2
HEADER_BYTES = 128
TILE_INPUTS = (128, 64, 32)
TileKind = Literal["nf4", "fp4", "e2m1", "iq4", "int4"]


@dataclass(frozen=True)
class TileFormat:
    """What a tile holds.

    Attributes:
        kind: how its codes are stored.
        inputs: C, 32, 64 or 128; so many weights of a row share a scale.
        symmetric: whether it has no zeros.
    """

    kind: TileKind
    inputs: int
    symmetric: bool = True

    @property
    def code_bytes(self) -> int:
        return BYTE_ROWS * self.inputs

    @property
    def tile_bytes(self) -> int:
        return self.code_bytes + BYTE_ROWS * 4 * (1 if self.symmetric else 2)

    def matrix_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix [N, K], header included."""
        return HEADER_BYTES + shape[0] // PANEL * (shape[1] // self.inputs) * self.tile_bytes


def tile_format(
    kind: TileKind,
    shape: tuple[int, int],
    *,
    group: int,
    symmetric: bool = True,
    rows: int = PANEL,
    where: str = "the weight",
) -> TileFormat:
    """The tile format of a matrix [N, K].

    Args:
        group: consecutive inputs of a row that share a scale.
        rows: the number that N must be a multiple of.
        where: the matrix, for errors.

    Raises:
        UnsupportedError: N is no multiple of `rows`, K no whole number of groups, or the group no
            multiple of 32.
    """
    out_features, in_features = shape
    if out_features % rows:
        raise refusal(
            "no packed layout for this shape", where, f"a multiple of {rows} outputs", out_features
        )
    inputs = next((size for size in TILE_INPUTS if group % size == 0), None)
    if inputs is None or in_features % group:
        raise refusal(
            "no packed layout for this shape",
            where,
            "inputs in whole groups, a multiple of 32 each",
            f"{in_features} inputs in groups of {group}",
        )
    return TileFormat(kind, inputs, symmetric)


def refusal(what: str, where: str, expected: object, found: object) -> UnsupportedError:
    """The error of a weight that has no packed layout."""
    return UnsupportedError(
        what,
        where=where,
        expected=expected,
        found=found,
        remedy="The fallback kernel multiplies such a weight.",
    )
