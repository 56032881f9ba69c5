"""Codes of 2, 3, 5 and 6 bits, cut into slices of bits that fill whole words.

    code    lower slice    upper slice
    2       2
    3       2              1
    5       4              1
    6       4              2

Of the codes that a lane holds (`lanes`), those with the same r and c are 32 of both planes and of
128 inputs: 16 pairs of neighbours. Pair 4b + 2h + j is of block b of 32 inputs, plane h, half j. A
slice of w bits of them fills w words. The two codes of a pair lie 16 bits apart, so that one
instruction takes the bits of both out of a word, and `Field` says where.

A word is rotated first. Rotated by 0 and by 8, that of a lower slice has all of its pairs in the
lower byte of each half, so that there is room for the upper bits in the mantissa of a float16. And
that of an upper slice has the bits of as many pairs as a lower word directly above them.

Knows no torch. `lanes` makes the words, kernels.gpu.ptx the instructions that read them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

SLICED_INPUTS = 128  # of a tile: a word of a slice of one bit
BLOCK_INPUTS = 32  # whose codes matrix instructions take as they come
SLICE_BYTES = 2048  # of a slice of one bit of a tile: a lane's 16 bytes are one load
PAIRS = 16
_HALF = 16  # bits
SLICES: Mapping[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 5: (4, 1), 6: (4, 2)}


@dataclass(frozen=True)
class Field:
    """Where a slice has the bits of a pair.

    Attributes:
        word: among the words of all slices, the lower one's first.
        rotation: to the right, after which both codes' bits lie where they are wanted: `at` and
            `at + 16`.
        below: bits of the code below this slice.
        width: bits of the slice.
    """

    word: int
    rotation: int
    at: int
    below: int
    width: int

    def first_bit(self, code: int) -> int:
        """The lowest of the bits of code 0 or 1 of the pair, in the word as it is stored."""
        return (self.at + self.rotation + _HALF * code) % (2 * _HALF)


@cache
def fields(bits: int) -> tuple[tuple[Field, ...], ...]:
    """The fields of each pair of codes of so many bits: one, or the lower and the upper one."""
    return tuple(_fields_of(pair, SLICES[bits]) for pair in range(PAIRS))


def _fields_of(pair: int, widths: tuple[int, ...]) -> tuple[Field, ...]:
    lower, first, below, found = widths[0], 0, 0, []
    for width in widths:
        word, number = divmod(pair, _HALF // width)
        turn, place = divmod(number, 8 // lower)
        bytes_on, bits_on = divmod(turn, lower // width)
        rotation = width * bits_on + 8 * bytes_on
        found.append(Field(first + word, rotation, lower * place + below, below, width))
        first, below = first + width, below + width
    return tuple(found)
