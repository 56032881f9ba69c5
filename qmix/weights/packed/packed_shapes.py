"""Which matrices of a model are packed together, and in which format, for packing and planning.

    q, k and v         one matrix, in a format that holds all three; otherwise each by itself
    w1 and w3          one matrix of an expert's blob, row by row; w2 is the other
    a layer's experts  one table; if an expert has no format, each matrix by itself
    any other matrix   by itself, with rows of zeros that fill its last panel

All of a packed weight but its codes stays on the host as it was read. Knows no torch and no
weights: a MatrixSpec says what decides the format of one. Shape letters: see qmix.kernels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd

from qmix.errors import UnsupportedError
from qmix.weights.packed.tile_format import (
    BYTE_ROWS,
    PANEL,
    TileFormat,
    TileKind,
    refusal,
    tile_format,
)
from qmix.weights.scheme import Kind

# Kinds whose values every matrix brings with it; they are integers of eight bits.
_GRIDS: tuple[Kind, ...] = ("iq3_xxs", "iq3_s", "iq2", "iq1")
# Fewer bits first.
_INTEGERS: tuple[TileKind, ...] = ("int2", "int3", "int4", "int5", "int6", "int8")
_OF_INTEGERS: Mapping[Kind, TileKind] = {kind: kind for kind in _INTEGERS}
_TILE_KINDS: Mapping[Kind, TileKind] = {
    "nf4": "nf4",
    "fp4": "fp4",
    "e2m1": "e2m1",
    "iq4": "iq4",
    **dict.fromkeys(_GRIDS, "iq4"),
    **_OF_INTEGERS,
}
# What a matrix is packed as beside one of another kind. IQ4's values are integers of eight bits.
_AS_INTEGERS: Mapping[Kind, TileKind] = {
    **_OF_INTEGERS,
    "iq4": "int8",
    **dict.fromkeys(_GRIDS, "int8"),
}


@dataclass(frozen=True)
class MatrixSpec:
    """What decides how a matrix is packed.

    Attributes:
        shape: (N, K).
        group: consecutive weights that share a scale.
        own_table: its codes stand for other values than those of its kind, which only the weight
            itself tells.
    """

    kind: Kind
    shape: tuple[int, int]
    group: int
    symmetric: bool
    own_table: bool = False


@dataclass(frozen=True)
class ExpertFormat:
    """How an expert is packed: w1 with w3 as a matrix of the shape (2F, D), then w2 (D, F)."""

    gate_up: TileFormat
    down: TileFormat
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the expert's blob."""
        rows, hidden = self.shape
        return self.gate_up.matrix_bytes(self.shape) + self.down.matrix_bytes((hidden, rows // 2))


def matrix_format(spec: MatrixSpec, where: str = "the weight", *, rows: int = PANEL) -> TileFormat:
    """The tile format of a matrix.

    Args:
        where: the matrix, for errors.
        rows: the number that N must be a multiple of.

    Raises:
        UnsupportedError: the packed layout has no such kind, or no such shape or group.
    """
    kind = _TILE_KINDS.get(spec.kind)
    if kind is None:
        expected = "a table of 16 values, or integers"
        raise refusal(f"no packed layout for {spec.kind}", where, expected, spec.kind)
    return tile_format(
        kind,
        spec.shape,
        group=spec.group,
        symmetric=spec.symmetric,
        own_table=spec.own_table or spec.kind in _GRIDS,
        rows=rows,
        where=where,
    )


def padded(spec: MatrixSpec) -> MatrixSpec:
    """A matrix with rows of zeros that fill its last panel, as of a head with added tokens."""
    rows, columns = spec.shape
    return replace(spec, shape=(-(-rows // PANEL) * PANEL, columns))


def joined(specs: Sequence[MatrixSpec]) -> MatrixSpec:
    """q, k and v as one matrix of all their rows, in the narrowest form that holds all of them.

    Raises:
        UnsupportedError: there is no such form, or a block would belong to two of them.
    """
    first, kind = specs[0], _kind_of_all(specs)
    same_inputs = all(spec.shape[1] == first.shape[1] for spec in specs)
    straddling = any(spec.shape[0] * spec.shape[1] % spec.group for spec in specs)
    mixed = len({spec.own_table for spec in specs}) > 1
    if kind is None or not same_inputs or straddling or mixed:
        raise UnsupportedError("no packed layout holds all of the matrices that are joined")
    return MatrixSpec(
        kind,
        (sum(spec.shape[0] for spec in specs), first.shape[1]),
        gcd(*(spec.group for spec in specs)),
        all(spec.symmetric for spec in specs),
        first.own_table,
    )


def _kind_of_all(specs: Sequence[MatrixSpec]) -> Kind | None:
    """The kind of matrices that are packed as one: theirs, or the narrowest integers that hold all.

    None: there is none.
    """
    kinds = {spec.kind for spec in specs}
    if len(kinds) == 1:
        return specs[0].kind
    if not kinds <= _AS_INTEGERS.keys():
        return None
    return max((_AS_INTEGERS[kind] for kind in kinds), key=_INTEGERS.index)


def expert_format(w1: MatrixSpec, w2: MatrixSpec, w3: MatrixSpec) -> ExpertFormat:
    """The format of an expert.

    Raises:
        UnsupportedError: a matrix has no packed layout, or w1 and w3 are stored differently.
    """
    kind = _kind_of_all((w1, w3))
    if kind is not None:
        w1, w3 = replace(w1, kind=kind), replace(w3, kind=kind)
    gate = matrix_format(w1, "w1", rows=BYTE_ROWS)
    up = matrix_format(w3, "w3", rows=BYTE_ROWS)
    if (gate, w1.group) != (up, w3.group):
        raise refusal(
            "w1 and w3 of an expert are packed together and must be stored alike",
            "w3",
            f"{gate}, group {w1.group}",
            f"{up}, group {w3.group}",
        )
    width, hidden = w1.shape
    return ExpertFormat(gate, matrix_format(w2, "w2"), (2 * width, hidden))


def table_formats(layers: Sequence[Sequence[ExpertFormat]]) -> tuple[ExpertFormat, ...]:
    """The formats of the experts of an address table, the same in each of its layers.

    Args:
        layers: the formats of each layer's experts.

    Raises:
        UnsupportedError: a layer's number of experts is no power of two, experts differ in shape,
            or layers in format.
    """
    count, first = len(layers[0]), tuple(layers[0])
    if count & (count - 1):
        raise UnsupportedError(
            "the kernels count experts by powers of two",
            expected="1, 2, 4, 8, ...",
            found=count,
        )
    for index, layer in enumerate(layers):
        for expert, alike in zip(layer, first, strict=True):
            if expert != alike or expert.shape != first[0].shape:
                raise UnsupportedError(
                    "the experts of a table must have one shape, and its layers one format",
                    where=f"layer {index}",
                    expected=first[0],
                    found=expert,
                    remedy="The fallback kernel multiplies such a model.",
                )
    return first


def require_silu(*, fused: bool) -> None:
    """Raise unless the experts' activation is the one that the kernels fuse.

    Raises:
        UnsupportedError: it is another one.
    """
    if not fused:
        raise UnsupportedError("the kernels fuse SiLU only")
