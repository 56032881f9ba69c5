"""The values that packed codes stand for, and the words of a table that the kernels keep.

Why the codes are renumbered is said in kernels/gpu/ptx.py.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qmix.weights.packed.tile_format import TileKind
from qmix.weights.table import VALUES, TableKind

# Half of the range of integers: the zero of symmetric ones.
HALF_RANGE: Mapping[TileKind, int] = {
    "int2": 2,
    "int3": 4,
    "int4": 8,
    "int5": 16,
    "int6": 32,
    "int8": 128,
}

# What a table is multiplied by, so that its codes can be paired; the scales take it back. NF4:
# among the 16.8 M factors in [1, 2) that allow the pairing, the one with the smallest maximum
# rounding error: 1.82e-4, where the plain table has 3.3e-4. The others are exact in float16: FP4 in
# twelfths, IQ4 in integers.
_STRETCH: Mapping[TableKind, float] = {"nf4": 1.2332144, "fp4": 12.0, "e2m1": 1.0, "iq4": 13.0}


@dataclass(frozen=True)
class StoredTable:
    """A table of 16 values in float16, its codes renumbered.

    Attributes:
        stretch: what the values were multiplied by.
        code_of_stored: the code of each stored code.
        bits: the float16 bits of each stored code.
        folded: the wrong half of a plane is folded in, which needs paired codes.
    """

    stretch: float
    code_of_stored: tuple[int, ...]
    bits: tuple[int, ...]
    folded: bool = True

    @property
    def stored_of_code(self) -> tuple[int, ...]:
        return tuple(self.code_of_stored.index(code) for code in range(16))

    @property
    def values(self) -> tuple[float, ...]:
        """The float16 values of the stored codes, with which the kernels compute."""
        return tuple(struct.unpack("<e", struct.pack("<H", bits))[0] for bits in self.bits)

    def plane(self, shift: int) -> list[int]:
        """Bytes `bits >> shift` of all codes as four words."""
        plane = [bits >> shift & 0xFF for bits in self.bits]
        if self.folded:
            low, high = plane[:8], plane[8:]
            plane = low + [b ^ (0xFF if a & 0x80 else 0) for a, b in zip(low, high, strict=True)]
        return [int.from_bytes(bytes(plane[i : i + 4]), "little") for i in range(0, 16, 4)]

    @property
    def words(self) -> tuple[int, ...]:
        """The words of the planes that a header holds: all eight, or of folded ones every other.

        A permutation reads two words. Of folded planes the first is an operand of the instructions:
        as constants, both would be moved to a register again and again, 1.25 instructions a weight.
        Operands `$5` on are these words, each four times, once for every byte of the word.
        """
        step = 2 if self.folded else 1
        return (*self.plane(8)[::step], *self.plane(0)[::step])


def own_table(values: Sequence[float]) -> StoredTable:
    """Any 16 values, with the codes as they are; the largest is brought into [1, 2)."""
    largest = max(map(abs, values))
    stretch = math.ldexp(1.0, 1 - math.frexp(largest)[1]) if largest else 1.0
    bits = tuple(half_bits(stretch * value) for value in values)
    return StoredTable(stretch, tuple(range(16)), bits, folded=False)


def half_bits(value: float) -> int:
    """The bits of the float16 nearest to a value."""
    bits: int = struct.unpack("<H", struct.pack("<e", value))[0]
    return bits


def _signed_zeros(values: Sequence[float]) -> list[float]:
    """The last zero is -0: that makes the negative codes as many as the others."""
    signed = list(values)
    if 0.0 in signed:
        signed[15 - signed[::-1].index(0.0)] = -0.0
    return signed


def _stored(kind: TableKind) -> StoredTable:
    """The stored codes c and c + 8 have the same top bits in both bytes."""
    stretch = _STRETCH[kind]
    of_code = [half_bits(stretch * value) for value in _signed_zeros(VALUES[kind])]
    classes: dict[int, list[int]] = {}
    for code, bits in enumerate(of_code):
        classes.setdefault(bits & 0x8080, []).append(code)
    low: list[int] = []
    high: list[int] = []
    for pair_codes in classes.values():
        assert len(pair_codes) % 2 == 0
        low += pair_codes[0::2]
        high += pair_codes[1::2]
    numbers = (*low, *high)
    return StoredTable(stretch, numbers, tuple(of_code[code] for code in numbers))


TABLES: Mapping[TableKind, StoredTable] = {kind: _stored(kind) for kind in _STRETCH}
