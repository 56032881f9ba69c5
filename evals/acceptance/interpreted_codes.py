"""Inline assembly in Triton's interpreter, which has none: its values, looked up.

For rehearsals only. The tests run the assembly itself.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

from qmix.kernels.gpu import ptx
from qmix.weights.packed.codes import HALF_RANGE, TABLES

_VALUES = {ptx.TABLE_INSTRUCTIONS[kind]: table.values for kind, table in TABLES.items()}
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
    """Float16 of the low and of the high nibbles of the first operand's bytes."""
    values = np.array(_VALUES[assembly], np.float16)
    words: NDArray[np.uint8] = operands[0].data
    nibbles = (words & 15, words >> 4)
    return Results(
        tuple(
            interpreter.TensorHandle(values[codes], each.scalar)
            for codes, each in zip(nibbles, types, strict=True)
        )
    )


def install() -> None:
    """Triton's interpreter knows the assembly of packed codes from now on."""
    interpreter.InterpreterBuilder.create_inline_asm = look_up
