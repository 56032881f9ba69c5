"""Inline assembly in Triton's own interpreter, which has none: run as the PTX of a kernel is.

Knows `=r`, `=&r` and `r` operands, 32-bit registers only, and no memory.
"""

import re
from functools import cache

import numpy as np
from triton.runtime import interpreter

from qmix.evals.acceptance.interpreted_codes import Results
from tests.support.ptx.errors import UnknownInstructionError
from tests.support.ptx.machine import Machine, check_known
from tests.support.ptx.source import parse


@cache
def _program(assembly, operands):
    """The assembly as a kernel, and the register of each operand."""
    names = [f"%operand{index}_" for index in range(operands)]
    body = re.sub(r"\$(\d+)", lambda match: names[int(match[1])], assembly)
    # The first instruction names every operand once, so that each has a register.
    program = parse(
        ".visible .entry inline()\n{\n.reg .b32 " + ", ".join(names) + ";\n"
        f"mov.b32 _, {{{', '.join(names)}}};\n{body}\nret;\n}}\n"
    )
    (named, *first), *rest = program.blocks
    program = type(program)("inline", (), (tuple(first), *rest), program.labels, program.registers)
    check_known(program)
    return program, named.operands[1]


def run(assembly, inputs, outputs):
    """Run it in as many lanes as the inputs have elements.

    Args:
        inputs: uint32 [lanes] of each register that is read.
        outputs: how many registers it writes; they come first among its operands.

    Returns:
        uint32 [lanes] of each output.
    """
    program, registers = _program(assembly, outputs + len(inputs))
    lanes = len(inputs[0])
    machine = Machine(program, np.zeros(1, np.int64), (1, 1, 1), lanes, {}, None, 0)
    for register, values in zip(registers[outputs:], inputs, strict=True):
        machine.lanes.write(register, values)
    with np.errstate(all="ignore"):
        machine.run()
    machine.lanes.run_for(np.ones(lanes, bool))
    return [machine.lanes.demand(register, "b32") for register in registers[:outputs]]


def _registers(array, pack):
    """Elements in order -> uint32 [lanes] for each register that `pack` of them fill."""
    words = np.ascontiguousarray(array).reshape(-1, pack).view(np.uint8)
    if words.shape[1] % 4:
        raise UnknownInstructionError(f"{pack} elements of {array.dtype} fill no 32-bit registers")
    return list(np.ascontiguousarray(words.view(np.uint32).T))


def execute(_, assembly, constraints, values, types, is_pure, pack):
    """Stands for the interpreter's `create_inline_asm`."""
    dtypes = [interpreter._get_np_dtype(each) for each in types]
    counts = [pack * dtype.itemsize // 4 for dtype in dtypes]
    inputs = [register for value in values for register in _registers(value.data, pack)]
    wanted = ["=&r"] * sum(counts) + ["r"] * len(inputs)
    if constraints.replace("=r", "=&r").split(",") != wanted:
        raise UnknownInstructionError(f"constraints {constraints}, not {','.join(wanted)}")
    found, handles = run(assembly, inputs, sum(counts)), []
    for each, dtype, count in zip(types, dtypes, counts, strict=True):
        words = np.stack([found.pop(0) for _ in range(count)], 1)
        data = words.view(dtype).reshape(values[0].data.shape)
        handles.append(interpreter.TensorHandle(data, each.scalar))
    return Results(tuple(handles))


def install():
    """Triton's interpreter knows inline assembly from now on."""
    interpreter.InterpreterBuilder.create_inline_asm = execute
