"""The values that packed codes stand for, and the words of NF4's table that the kernels keep.

Why the codes are renumbered is said in kernels/gpu/ptx.py.
"""

import struct

from qmix.weights.table import NF4_VALUES

# Among the 16.8 M factors in [1, 2) that allow the pairing, the one with the smallest maximum
# rounding error: 1.82e-4, where the plain table has 3.3e-4. It requires that zero is stored as -0.
NF4_STRETCH = 1.2332144

INT4_ZERO = 8


def _half_bits(value: float) -> int:
    bits: int = struct.unpack("<H", struct.pack("<e", value))[0]
    return bits


def _nf4_bits() -> tuple[int, ...]:
    """The float16 bits of each NF4 code, stretched; zero is -0."""
    return tuple(_half_bits(NF4_STRETCH * value or -0.0) for value in NF4_VALUES)


def _nf4_codes() -> tuple[int, ...]:
    """The NF4 code of each stored code: c and c + 8 have the same top bits in both bytes."""
    classes: dict[int, list[int]] = {}
    for code, bits in enumerate(_nf4_bits()):
        classes.setdefault(bits & 0x8080, []).append(code)
    low: list[int] = []
    high: list[int] = []
    for pair_codes in classes.values():
        assert len(pair_codes) % 2 == 0
        low += pair_codes[0::2]
        high += pair_codes[1::2]
    return (*low, *high)


NF4_CODE_OF_STORED = _nf4_codes()
NF4_STORED_OF_CODE = tuple(NF4_CODE_OF_STORED.index(code) for code in range(16))
NF4_STORED_BITS = tuple(_nf4_bits()[code] for code in NF4_CODE_OF_STORED)
# The float16 values of the stored codes, with which the kernels compute.
NF4_STORED_VALUES = tuple(
    struct.unpack("<e", struct.pack("<H", bits))[0] for bits in NF4_STORED_BITS
)


def nf4_plane(shift: int) -> list[int]:
    """Bytes `bits >> shift` of the 16 stored codes as four words, with the wrong half folded in."""
    plane = [bits >> shift & 0xFF for bits in NF4_STORED_BITS]
    folded = plane[:8]
    folded += [b ^ (0xFF if a & 0x80 else 0) for a, b in zip(plane, plane[8:], strict=False)]
    return [int.from_bytes(bytes(folded[i : i + 4]), "little") for i in range(0, 16, 4)]


# A permutation reads two words. The first is an operand of the instructions: as constants, both
# would be moved to a register again and again, 1.25 instructions a weight. Operands `$5` to `$20`
# are these four words, each four times, once for every byte of the word.
NF4_WORDS = (*nf4_plane(8)[0::2], *nf4_plane(0)[0::2])
