# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, RET505
"""How the Triton kernels of packed matmuls decode a tile whose codes are slices of bits.

The tile has 128 inputs, because a word of a slice of one bit holds codes of all of them. Decoded
they are four blocks of 32 inputs, each an operand of matrix instructions as it comes: no value
moves between threads.

Knows no kernel. Shape letters: see qmix.kernels.
"""

import triton
import triton.language as tl

from qmix.kernels.gpu import ptx

_INSTRUCTIONS_2 = tl.constexpr(ptx.SLICED_INSTRUCTIONS[2])
_INSTRUCTIONS_3 = tl.constexpr(ptx.SLICED_INSTRUCTIONS[3])
_INSTRUCTIONS_5 = tl.constexpr(ptx.SLICED_INSTRUCTIONS[5])
_INSTRUCTIONS_6 = tl.constexpr(ptx.SLICED_INSTRUCTIONS[6])
_CONSTRAINTS_2 = tl.constexpr(ptx.SLICED_CONSTRAINTS[2])
_CONSTRAINTS_3 = tl.constexpr(ptx.SLICED_CONSTRAINTS[3])
_CONSTRAINTS_5 = tl.constexpr(ptx.SLICED_CONSTRAINTS[5])
_CONSTRAINTS_6 = tl.constexpr(ptx.SLICED_CONSTRAINTS[6])
_WORDS_2 = tl.constexpr(ptx.SLICED_WORDS[2])  # and of codes of three bits
_WORDS_6 = tl.constexpr(ptx.SLICED_WORDS[6])  # and of five


@triton.constexpr_function
def is_sliced(KIND):
    """Whether codes are cut into slices of bits."""
    return KIND in ("int2", "int3", "int5", "int6")


@triton.constexpr_function
def block_inputs(KIND, C):
    """Inputs whose decoded codes are one operand."""
    return 32 if is_sliced(KIND) else C


@triton.jit
def decode_slices(words, table, KIND: tl.constexpr):
    """Words -> float16 values of the low and of the high plane, of each block in turn."""
    if KIND == "int2":
        return _decoded(words + table, _INSTRUCTIONS_2, _CONSTRAINTS_2)
    elif KIND == "int3":
        return _decoded(words + table, _INSTRUCTIONS_3, _CONSTRAINTS_3)
    elif KIND == "int5":
        return _decoded(words + table, _INSTRUCTIONS_5, _CONSTRAINTS_5)
    else:
        return _decoded(words + table, _INSTRUCTIONS_6, _CONSTRAINTS_6)


@triton.jit
def _decoded(operands, INSTRUCTIONS: tl.constexpr, CONSTRAINTS: tl.constexpr):
    return tl.inline_asm_elementwise(
        INSTRUCTIONS, CONSTRAINTS, operands,
        (
            tl.float16, tl.float16, tl.float16, tl.float16,
            tl.float16, tl.float16, tl.float16, tl.float16,
        ), False, 4,
    )  # fmt: skip


@triton.jit
def slice_decoding_words(zero, KIND: tl.constexpr):
    """What the instructions want in registers, plus a zero."""
    if KIND == "int2" or KIND == "int3":
        return zero + _WORDS_2[0], zero + _WORDS_2[1], zero + _WORDS_2[2], zero + _WORDS_2[3]
    else:
        return zero + _WORDS_6[0], zero + _WORDS_6[1]
