"""How four packed bytes become eight 16-bit values: the instructions, and what they mean.

Shape letters: none. Knows nothing of torch or triton. A word is four bytes of a tile; byte i holds
a code of the low plane in its low nibble and one of the high plane in its high nibble. Each
instruction string reads the word `$4` and writes four registers of two float16 values: `$0`, `$1`
are the low plane's codes of bytes 0, 1 and 2, 3, `$2`, `$3` the high plane's.

NF4 is a table of 16 float16 values, kept as two planes of 16 bytes. One byte permutation (`prmt`)
picks four bytes out of eight, so a plane takes two, for codes 0 to 7 and 8 to 15. A selector of 8
or more yields eight copies of the picked byte's top bit instead; where bytes c and c + 8 of a plane
agree in their top bit, the wrong half therefore yields a known byte, 0 or 255, which is folded into
the table, and one `xor` merges the halves. Two freedoms make the top bits agree: the codes are
renumbered, and the table is stretched by a constant that the scales take back. 19 integer
instructions for 8 weights.
"""

import struct

from qmix.weights.nf4 import NF4_VALUES

# Of 16.8 M factors in [1, 2) the one with the smallest largest rounding error (1.82e-4, against
# 3.3e-4 of the plain table) among those that allow the pairing. With it zero must be stored as -0.
NF4_STRETCH = 1.2332144

INT4_ZERO = 8


def _half_bits(value: float) -> int:
    bits: int = struct.unpack("<H", struct.pack("<e", value))[0]
    return bits


def _nf4_bits() -> tuple[int, ...]:
    """The float16 bits of each NF4 code, stretched; zero is -0."""
    return tuple(_half_bits(NF4_STRETCH * value or -0.0) for value in NF4_VALUES)


def _nf4_codes() -> tuple[int, ...]:
    """The NF4 code behind each stored code: c and c + 8 agree in the top bits of both bytes."""
    classes: dict[int, list[int]] = {}
    for code, bits in enumerate(_nf4_bits()):
        classes.setdefault(bits & 0x8080, []).append(code)
    low: list[int] = []
    high: list[int] = []
    for members in classes.values():
        assert len(members) % 2 == 0
        low += members[0::2]
        high += members[1::2]
    return (*low, *high)


NF4_CODE_OF_STORED = _nf4_codes()
NF4_STORED_OF_CODE = tuple(NF4_CODE_OF_STORED.index(code) for code in range(16))
NF4_STORED_BITS = tuple(_nf4_bits()[code] for code in NF4_CODE_OF_STORED)
# What the kernels compute with: float16 values of the stored codes.
NF4_STORED_VALUES = tuple(
    struct.unpack("<e", struct.pack("<H", bits))[0] for bits in NF4_STORED_BITS
)


def _plane(shift: int) -> list[int]:
    """Bytes `bits >> shift` of the 16 stored codes as four words, the wrong half folded in."""
    plane = [bits >> shift & 0xFF for bits in NF4_STORED_BITS]
    folded = plane[:8]
    folded += [b ^ (0xFF if a & 0x80 else 0) for a, b in zip(plane, plane[8:], strict=False)]
    return [int.from_bytes(bytes(folded[i : i + 4]), "little") for i in range(0, 16, 4)]


# Of each permutation's two words the first is handed in: as constants both would be moved to a
# register again and again, 1.25 instructions a weight. `$5` to `$20` are these four words, each
# four times, once for every byte of the word.
NF4_WORDS = (*_plane(8)[0::2], *_plane(0)[0::2])


def _nf4() -> str:
    high, low = (
        (f"0x{word:08x}" for word in _plane(8)[1::2]),
        (f"0x{word:08x}" for word in _plane(0)[1::2]),
    )
    (h0, h1), (l0, l1) = high, low
    lines = ["{", ".reg .b32 s, t, h, l, x;"]
    for first, second, source in (("$0", "$2", "$4"), ("$1", "$3", "s")):
        if source == "s":
            lines.append("shr.b32 s, $4, 16;")
        lines += [
            f"xor.b32 t, {source}, 0x88888888;",
            f"prmt.b32 h, $5, {h0}, {source};",
            f"prmt.b32 x, $9, {h1}, t;",
            "xor.b32 h, h, x;",
            f"prmt.b32 l, $13, {l0}, {source};",
            f"prmt.b32 x, $17, {l1}, t;",
            "xor.b32 l, l, x;",
            f"prmt.b32 {first}, l, h, 0x6240;",
            f"prmt.b32 {second}, l, h, 0x7351;",
        ]
    return "\n".join([*lines, "}"])


def _int4() -> str:
    """A code in the low mantissa bits of 1024 or of 64 is that number plus the code."""
    lines = ["{", ".reg .b32 u, m, n;", "mov.b32 m, 0xe408e408;", "mov.b32 n, 0xd480d480;"]
    for first, second, spread in (("$0", "$2", "0x4140"), ("$1", "$3", "0x4342")):
        lines += [
            f"prmt.b32 u, $4, 0, {spread};",  # bytes b 0 b' 0
            f"lop3.b32 {first}, u, 0x000f000f, 0x64006400, 0xea;",  # (u & mask) | 1024
            f"lop3.b32 {second}, u, 0x00f000f0, 0x54005400, 0xea;",  # (u & mask) | 64
            f"add.f16x2 {first}, {first}, m;",  # - 1032
            f"add.f16x2 {second}, {second}, n;",  # - 72
        ]
    return "\n".join([*lines, "}"])


NF4_INSTRUCTIONS = _nf4()
INT4_INSTRUCTIONS = _int4()
# Outputs are written before the inputs are read for the last time.
INT4_CONSTRAINTS = "=&r,=&r,=&r,=&r,r"
NF4_CONSTRAINTS = INT4_CONSTRAINTS + 16 * ",r"
