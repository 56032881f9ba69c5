# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, RET505
"""What the Triton kernels of packed matmuls do with a tile: codes, scales and zeros to operands.

Knows no kernel. Shape letters: see qmix.kernels.
"""

import triton
import triton.language as tl

from qmix.kernels.gpu import ptx
from qmix.kernels.gpu.slices_triton import (
    decode_slices,
    is_sliced,
    slice_decoding_words,
)
from qmix.weights.packed import bit_slices, tile_format

NF4_INSTRUCTIONS = tl.constexpr(ptx.TABLE_INSTRUCTIONS["nf4"])
FP4_INSTRUCTIONS = tl.constexpr(ptx.TABLE_INSTRUCTIONS["fp4"])
E2M1_INSTRUCTIONS = tl.constexpr(ptx.TABLE_INSTRUCTIONS["e2m1"])
IQ4_INSTRUCTIONS = tl.constexpr(ptx.TABLE_INSTRUCTIONS["iq4"])
ANY_TABLE_INSTRUCTIONS = tl.constexpr(ptx.ANY_TABLE_INSTRUCTIONS)
INT4_INSTRUCTIONS = tl.constexpr(ptx.INT4_INSTRUCTIONS)
INT8_INSTRUCTIONS = tl.constexpr(ptx.INT8_INSTRUCTIONS)
TABLE_CONSTRAINTS = tl.constexpr(ptx.TABLE_CONSTRAINTS)
ANY_TABLE_CONSTRAINTS = tl.constexpr(ptx.ANY_TABLE_CONSTRAINTS)
INT4_CONSTRAINTS = tl.constexpr(ptx.INT4_CONSTRAINTS)
INT8_CONSTRAINTS = tl.constexpr(ptx.INT8_CONSTRAINTS)
INT4_WORDS = tl.constexpr(ptx.INT4_WORDS)
SLICE_BYTES = tl.constexpr(bit_slices.SLICE_BYTES)
BYTE_ROWS = tl.constexpr(tile_format.BYTE_ROWS)
HEADER = tl.constexpr(tile_format.HEADER_BYTES)


@triton.constexpr_function
def bits_of(KIND):
    """Bits of a code; tables have four."""
    return int(KIND[3:]) if KIND[:3] == "int" else 4


@triton.jit
def load_blocks(pointers, STEP: tl.constexpr, COUNT: tl.constexpr):
    """What so many pointers to blocks, each STEP behind the last, point to."""
    found = ()
    for block in tl.static_range(COUNT):
        found += (tl.load(pointers + block * STEP),)
    return found


@triton.jit
def tile_words(tile, places, KIND: tl.constexpr, C: tl.constexpr):
    """The bytes of a tile's codes: those at `places`, and at the same places of further parts."""
    if is_sliced(KIND):
        return load_blocks(tile + places, SLICE_BYTES, bits_of(KIND))
    elif KIND == "int8":
        return tl.load(tile + places), tl.load(tile + BYTE_ROWS * C + places)
    else:
        return (tl.load(tile + places),)


@triton.jit
def decode(words, table, KIND: tl.constexpr):
    """`tile_words` -> float16 values of the low and of the high plane, of each block in turn.

    A byte holds codes of both planes, or one of eight bits, or parts of many codes.
    """
    word = words[0]
    if is_sliced(KIND):
        return decode_slices(words, table, KIND)
    elif KIND == "int8":
        return _byte(word, table), _byte(words[1], table)
    elif KIND == "int4":
        return tl.inline_asm_elementwise(
            INT4_INSTRUCTIONS, INT4_CONSTRAINTS, [word, table[0], table[1]],
            (tl.float16, tl.float16), False, 4,
        )  # fmt: skip
    elif KIND == "nf4":
        return _looked_up(word, table, NF4_INSTRUCTIONS)
    elif KIND == "fp4":
        return _looked_up(word, table, FP4_INSTRUCTIONS)
    elif KIND == "e2m1":
        return _looked_up(word, table, E2M1_INSTRUCTIONS)
    elif KIND == "iq4":
        return _looked_up(word, table, IQ4_INSTRUCTIONS)
    else:
        return tl.inline_asm_elementwise(
            ANY_TABLE_INSTRUCTIONS, ANY_TABLE_CONSTRAINTS,
            [word, table[0], table[1], table[2], table[3], table[4], table[5], table[6], table[7]],
            (tl.float16, tl.float16), False, 4,
        )  # fmt: skip


@triton.jit
def _byte(word, table):
    return tl.inline_asm_elementwise(
        INT8_INSTRUCTIONS, INT8_CONSTRAINTS, [word, table[0]], tl.float16, False, 4
    )


@triton.jit
def _looked_up(word, table, INSTRUCTIONS: tl.constexpr):
    # Declared impure: otherwise the compiler sees 8-bit operands behind the assembly, and wants the
    # operand of the matrix unit in another order of inputs, one for each architecture.
    return tl.inline_asm_elementwise(
        INSTRUCTIONS, TABLE_CONSTRAINTS, [word, table[0], table[1], table[2], table[3]],
        (tl.float16, tl.float16), False, 4,
    )  # fmt: skip


@triton.jit
def decoding_words(matrix, KIND: tl.constexpr):
    """What the instructions want in registers: a table's words, from the header, or constants."""
    # A zero that the compiler does not know to be the same in all threads. If it knew, the words
    # would go to uniform registers, which a permutation cannot read, and be copied every time: one
    # more instruction for each weight. (It would know a minimum, whose instruction writes a uniform
    # register: of integers, and on sm_100 of floats too.)
    zero = tl.sum(tl.arange(0, 32).to(tl.float32), 0).to(tl.int32) - 496
    if KIND == "int4" or KIND == "int8":
        return zero + INT4_WORDS[0], zero + INT4_WORDS[1]
    elif is_sliced(KIND):
        return slice_decoding_words(zero, KIND)
    elif KIND == "table":
        words = (matrix + 16).to(tl.pointer_type(tl.int32)) + zero
        return (
            tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3),
            tl.load(words + 4), tl.load(words + 5), tl.load(words + 6), tl.load(words + 7),
        )  # fmt: skip
    else:  # Triton 3.6 would compile this after the return too
        words = (matrix + 16).to(tl.pointer_type(tl.int32)) + zero
        return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)


@triton.jit
def operand(values, WARPS: tl.constexpr, HALVES: tl.constexpr):
    """Packed bytes -> [WARPS * 16 rows, HALVES * 32 inputs]; no value moves between threads."""
    values = tl.reshape(values, [HALVES, WARPS, 8, 4, 2, 2, 2, 2])  # half, warp, g, t, c, r, j, p
    values = tl.permute(values, [1, 5, 2, 0, 6, 4, 3, 7])
    return tl.reshape(values, [WARPS * 16, HALVES * 32])


@triton.jit
def codes_at(part, WARPS: tl.constexpr, HALVES: tl.constexpr):
    """Offsets of a block's codes in a tile: all of it, or those of WARPS of its four warps."""
    if WARPS == 4:
        return tl.arange(0, HALVES * 2048)
    else:
        half = tl.arange(0, HALVES)[:, None] * 2048
        return half + part * (WARPS * 512) + tl.arange(0, WARPS * 512)[None, :]


@triton.jit
def both_planes(pair):
    """Scales or zeros of byte rows, int32: float16 of the low plane and of the high one."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low, ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def load_planes(pointers, GROUPS: tl.constexpr, BLOCKS: tl.constexpr, EACH: tl.constexpr):
    """Scales or zeros of both planes of each block in turn: one load for EACH blocks.

    `pointers` are to the pairs of the first one, which has so many groups.
    """
    found = ()
    for load in tl.static_range(BLOCKS // EACH):
        planes = both_planes(tl.load(pointers + load * (BYTE_ROWS * GROUPS)))
        for _ in tl.static_range(EACH):
            found += planes
    return found


@triton.jit
def plane_pairs(section, rows):
    """Pointers to the scales or zeros of these byte rows."""
    return section.to(tl.pointer_type(tl.int32)) + rows


@triton.jit
def pair_places(rows, C: tl.constexpr, GROUP: tl.constexpr):
    """Where the scales or zeros of these byte rows lie: one a row, or [rows, groups] of them."""
    if GROUP == C:
        return rows
    else:
        return rows[:, None] + BYTE_ROWS * tl.arange(0, C // GROUP)[None, :]


@triton.jit
def of_inputs(values, C: tl.constexpr, GROUP: tl.constexpr):
    """A value a row, or a value a group, for each of a tile's inputs: [rows, 1] or [rows, C]."""
    if GROUP == C:
        return values[:, None]
    else:
        ROWS: tl.constexpr = values.shape[0]
        wide = tl.broadcast_to(values[:, :, None], [ROWS, C // GROUP, GROUP])
        return tl.reshape(wide, [ROWS, C])
