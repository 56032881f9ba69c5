"""PTX that turns four packed bytes into float16 values, and why it works.

Knows nothing of torch or triton. A word is four bytes of a tile; byte i holds a code of the low
plane in its low nibble and one of the high plane in its high nibble. Each instruction string reads
the word `$4` and writes four registers of two float16 values: `$0` and `$1` are the codes of the
low plane of bytes 0, 1 and 2, 3; `$2` and `$3` are those of the high plane. A byte that is a code
of its own gives two registers, `$0` and `$1`, of the word `$2`. Codes that are cut into slices of
bits give sixteen registers of as many words as they have bits (weights.packed.bit_slices).

NF4, FP4, E2M1 and IQ4 are tables of 16 float16 values, kept as two planes of 16 bytes. A byte
permutation (`prmt`) picks four bytes out of eight, so a plane takes two of them, for codes 0 to 7
and 8 to 15. A selector of 8 or more yields eight copies of the top bit of the picked byte instead.
If bytes c and c + 8 of a plane have the same top bit, the wrong half therefore yields a known byte,
0 or 255. That byte is folded into the table, and one `xor` merges the halves. Two freedoms make the
top bits equal: the codes are renumbered, and the table is stretched by a constant that the scales
take back. This takes 19 integer instructions for 8 weights. Other tables may have no such order and
take 21: both halves are picked by the lower three bits, and a permutation chooses by the fourth.
"""

from collections.abc import Mapping

from qmix.weights.packed.bit_slices import PAIRS, SLICES, fields
from qmix.weights.packed.codes import TABLES, StoredTable, half_bits
from qmix.weights.table import TableKind


def _looked_up(table: StoredTable) -> str:
    h0, h1, l0, l1 = (f"0x{word:08x}" for shift in (8, 0) for word in table.plane(shift)[1::2])
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


def _any_table() -> str:
    """Of a table whose eight words are operands: `$5` to `$17` the upper bytes, `$21` to `$33`."""
    lines = ["{", ".reg .b32 s, t, h, l, x;"]
    lines += ["and.b32 s, $4, 0x77777777;", "shr.b32 t, $4, 1;"]
    lines.append("lop3.b32 t, t, 0x44444444, 0x32103210, 0xea;")  # (t & mask) | places
    for first, second in (("$0", "$2"), ("$1", "$3")):
        if first == "$1":
            lines += ["shr.b32 s, s, 16;", "shr.b32 t, t, 16;"]
        lines += [
            "prmt.b32 h, $5, $9, s;",
            "prmt.b32 x, $13, $17, s;",
            "prmt.b32 h, h, x, t;",
            "prmt.b32 l, $21, $25, s;",
            "prmt.b32 x, $29, $33, s;",
            "prmt.b32 l, l, x, t;",
            f"prmt.b32 {first}, l, h, 0x6240;",
            f"prmt.b32 {second}, l, h, 0x7351;",
        ]
    return "\n".join([*lines, "}"])


def _int4() -> str:
    """A code in the low mantissa bits of 1024 or of 64 is that number plus the code.

    `$5` is twice the float16 1024, `$9` twice 64.
    """
    lines = ["{", ".reg .b32 u, m, n;", "mov.b32 m, 0xe408e408;", "mov.b32 n, 0xd480d480;"]
    for first, second, spread in (("$0", "$2", "0x4140"), ("$1", "$3", "0x4342")):
        lines += [
            f"prmt.b32 u, $4, 0, {spread};",  # bytes b 0 b' 0
            f"lop3.b32 {first}, u, 0x000f000f, $5, 0xea;",  # (u & mask) | 1024
            f"lop3.b32 {second}, u, 0x00f000f0, $9, 0xea;",  # (u & mask) | 64
            f"add.f16x2 {first}, {first}, m;",  # - 1032
            f"add.f16x2 {second}, {second}, n;",  # - 72
        ]
    return "\n".join([*lines, "}"])


def _int8() -> str:
    """A byte below the upper byte of 1024 is that number plus the byte; `$3` is twice 1024."""
    lines = ["{", ".reg .b32 m;", "mov.b32 m, 0xe480e480;"]
    for register, spread in (("$0", "0x7150"), ("$1", "0x7352")):
        lines.append(f"prmt.b32 {register}, $2, $3, {spread};")  # bytes b 0x64 b' 0x64
        lines.append(f"add.f16x2 {register}, {register}, m;")  # - 1152
    return "\n".join([*lines, "}"])


def _sliced(bits: int) -> str:
    """Codes of 32 weights out of slices of bits: `$0` to `$15` are the pairs, see `bit_slices`.

    `$16` on are the words. Behind them are the floats whose mantissa's bit 0, 2, 4 or 6 is worth 1
    (of a lower slice of four bits, 0 or 4): with a code in the bits from there on, such a float is
    itself plus the code.
    """
    lines, turned = ["{", ".reg .b32 t0, t1, m0, m2, m4, m6;"], [(-1, -1)] * 2
    for place in _places(bits):
        wrong = -_one_at(place) - (1 << bits - 1)
        lines.append(f"mov.b32 m{place}, 0x{_twice(wrong):08x};")
    for pair, parts in enumerate(fields(bits)):
        place = parts[0].at
        beside = f"${PAIRS + bits + 4 * _places(bits).index(place)}"
        for part, field in enumerate(parts):
            word = source = f"${PAIRS + field.word}"
            if field.rotation:
                source = f"t{part}"
                if turned[part] != (field.word, field.rotation):
                    turned[part] = field.word, field.rotation
                    lines.append(f"shf.r.wrap.b32 {source}, {word}, {word}, {field.rotation};")
            mask = ((1 << field.width) - 1 << field.at) * 0x10001
            lines.append(f"lop3.b32 ${pair}, {source}, 0x{mask:08x}, {beside}, 0xea;")  # and, or
            beside = f"${pair}"
        lines.append(f"add.f16x2 ${pair}, ${pair}, m{place};")
    return "\n".join([*lines, "}"])


def _places(bits: int) -> range:
    """The mantissa's bits at which a code can begin."""
    return range(0, 8, SLICES[bits][0])


def _one_at(place: int) -> float:
    """The float16 whose mantissa's bit `place` is worth 1."""
    return 2.0 ** (10 - place)


def _twice(value: float) -> int:
    """A word of two float16."""
    return half_bits(value) * 0x10001


TABLE_INSTRUCTIONS: Mapping[TableKind, str] = {
    kind: _looked_up(table) for kind, table in TABLES.items()
}
ANY_TABLE_INSTRUCTIONS = _any_table()
INT4_INSTRUCTIONS = _int4()
INT8_INSTRUCTIONS = _int8()
# Words that the instructions want in registers: as constants they would be moved there in every
# iteration of the loop.
INT4_WORDS = (0x64006400, 0x54005400)
SLICED_INSTRUCTIONS: Mapping[int, str] = {bits: _sliced(bits) for bits in SLICES}
SLICED_WORDS: Mapping[int, tuple[int, ...]] = {
    bits: tuple(_twice(_one_at(place)) for place in _places(bits)) for bits in SLICES
}
# Outputs are written before the inputs are read for the last time. A word is an operand four times,
# once for every byte.
_OPERANDS = "=&r,=&r,=&r,=&r,r"
INT4_CONSTRAINTS = _OPERANDS + 8 * ",r"
INT8_CONSTRAINTS = "=&r,=&r,r" + 4 * ",r"
TABLE_CONSTRAINTS = _OPERANDS + 16 * ",r"
ANY_TABLE_CONSTRAINTS = _OPERANDS + 32 * ",r"
SLICED_CONSTRAINTS: Mapping[int, str] = {
    bits: ",".join(["=&r"] * PAIRS + ["r"] * (bits + 4 * len(SLICED_WORDS[bits])))
    for bits in SLICES
}
