"""Inline assembly in Triton's interpreter, which has none: its values, looked up.

For rehearsals only. The tests run the assembly itself.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

from qmix.kernels.gpu import ptx
from qmix.weights.packed.bit_slices import PAIRS, fields
from qmix.weights.packed.codes import HALF_RANGE, TABLES

_VALUES = {ptx.TABLE_INSTRUCTIONS[kind]: table.values for kind, table in TABLES.items()}
_SLICED = {text: bits for bits, text in ptx.SLICED_INSTRUCTIONS.items()}
_VALUES[ptx.INT4_INSTRUCTIONS] = tuple(float(code - HALF_RANGE["int4"]) for code in range(16))


@dataclass(frozen=True)
class Results:
    """The tensors of inline assembly; Triton asks for one after the other."""

    handles: tuple[Any, ...]

    def get_result(self, index: int) -> Any:
        """One of them."""
        return self.handles[index]


def look_up(
    _: Any, assembly: str, constraints: str, operands: Any, types: Any, is_pure: bool, pack: int
) -> Results:
    """Float16 of the codes in the first operands: of each plane, and of each block if sliced."""
    if assembly in _SLICED:
        parts = _sliced_values([each.data for each in operands], _SLICED[assembly])
    else:
        values = np.array(_VALUES[assembly], np.float16)
        word: NDArray[np.uint8] = operands[0].data
        parts = [values[word & 15], values[word >> 4]]
    return Results(
        tuple(
            interpreter.TensorHandle(part, each.scalar)
            for part, each in zip(parts, types, strict=True)
        )
    )


def _sliced_values(operands: list[NDArray[np.uint8]], bits: int) -> list[NDArray[np.float16]]:
    """The values of both planes of each block, float16 like the operands of bytes."""
    shape = operands[0].shape
    words = [np.ascontiguousarray(each).reshape(-1, 4).view(np.uint32)[:, 0] for each in operands]
    values = np.full((PAIRS // 2, len(words[0]), 2, 2), -(1 << bits - 1), np.float16)
    for pair, parts in enumerate(fields(bits)):
        for field in parts:
            for code in range(2):
                part = words[field.word] >> field.first_bit(code) & (1 << field.width) - 1
                values[pair // 2, :, pair % 2, code] += part << field.below
    return [each.reshape(shape) for each in values]


def install() -> None:
    """Triton's interpreter knows the assembly of packed codes from now on."""
    interpreter.InterpreterBuilder.create_inline_asm = look_up
