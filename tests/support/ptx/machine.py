"""Runs a program's thread blocks, all lanes of several blocks at once.

Lanes that branch apart run one after the other, those at the earliest block of the text first, so
that they meet again where the paths do.
"""

import numpy as np

from tests.support.ptx import access, packed  # noqa: F401  packed enters its operations
from tests.support.ptx.errors import PtxError, UnknownInstructionError
from tests.support.ptx.lanes import Lanes
from tests.support.ptx.order import Clocks
from tests.support.ptx.shared import SharedMemory
from tests.support.ptx.source import Address, Special

_LANES = 4096  # of the thread blocks that run at once; more lanes make numpy's arrays too large
_BRANCHES = ("bra", "bra.uni", "ret", "exit")
_AXES = "xyz"


def check_known(program):
    """Raise UnknownInstructionError unless every opcode of a program is known."""
    for block in program.blocks:
        for instruction in block:
            if instruction.opcode not in _BRANCHES and access.find(instruction.opcode) is None:
                raise UnknownInstructionError(str(instruction))


def run(program, grid, threads, parameters, memory, shared_bytes):
    """Run all thread blocks of a grid.

    Args:
        parameters: bits of each, by name.
        memory: GlobalMemory.

    Raises:
        PtxError: with the line of the instruction.
    """
    check_known(program)
    blocks = int(np.prod(grid))
    together = max(1, _LANES // threads)
    for first in range(0, blocks, together):
        numbers = np.arange(first, min(first + together, blocks))
        with np.errstate(all="ignore"):
            Machine(program, numbers, grid, threads, parameters, memory, shared_bytes).run()


class Machine:
    """Some thread blocks of a grid; what the functions of `access` see."""

    def __init__(self, program, numbers, grid, threads, parameters, memory, shared_bytes):
        self.program, self.threads = program, threads
        self.parameters, self.memory = parameters, memory
        self.lanes = Lanes(
            len(numbers) * threads, program.registers, _specials(numbers, grid, threads)
        )
        opcodes = {instruction.opcode for block in program.blocks for instruction in block}
        narrowest = min(filter(None, map(access.bits_of_shared_access, opcodes)), default=32)
        self.clocks = Clocks(int(numbers[0]) * threads, threads, self.lanes.count)
        self.shared = SharedMemory(self.clocks, shared_bytes, min(narrowest, 32) // 8)

    def run(self):
        end = len(self.program.blocks)
        place = np.zeros(self.lanes.count, np.int64)
        while (block := place.min()) < end:
            here = place == block
            self.lanes.run_for(here)
            place = np.where(here, block + 1, place)
            for instruction in self.program.blocks[block]:
                try:
                    if instruction.guard is None:
                        self._step(instruction, place)
                    else:
                        with self.lanes.guarded(instruction.guard) as any_lane:
                            if any_lane:
                                self._step(instruction, place)
                            else:
                                self._skip(instruction)
                except (PtxError, AssertionError) as error:
                    kind = type(error) if isinstance(error, PtxError) else UnknownInstructionError
                    raise kind(f"{error}\n  {self.program.name}, {instruction}") from error

    def _step(self, instruction, place):
        self.lanes.begin()
        if instruction.opcode in ("ret", "exit"):
            place[self.lanes.indices] = len(self.program.blocks)
            self.lanes.end()
        elif instruction.opcode in _BRANCHES:
            place[self.lanes.indices] = self.program.labels[instruction.operands[0].name]
        else:
            access.find(instruction.opcode)(self, instruction.operands)

    def _skip(self, instruction):
        for target in instruction.operands[:1]:
            self.lanes.leave(target if isinstance(target, tuple) else (target,))

    def addresses(self, operand, bits):
        """The addresses of the active lanes, unsigned."""
        base, offset = operand.base, operand.offset
        values = self.lanes.of_active(self.lanes.demand(base, f"b{bits}"))
        return values + values.dtype.type(offset % (1 << bits))

    def load(self, space, operand, dtype, count):
        """[active lanes, count] values of a memory space."""
        assert isinstance(operand, Address)
        if space == "global":
            addresses = self.addresses(operand, 64)
            return self.memory.load(addresses, dtype, count, self.lanes.indices, self.clocks)
        return self.shared.load(self.lanes.indices, self.addresses(operand, 32), dtype, count)

    def store(self, space, operand, values):
        """Store [active lanes, count] values."""
        if space == "global":
            addresses = self.addresses(operand, 64)
            self.memory.store(addresses, values, self.lanes.indices, self.clocks)
        else:
            self.shared.store(self.lanes.indices, self.addresses(operand, 32), values)


def _specials(numbers, grid, threads):
    """The special registers of all lanes of the thread blocks with these numbers."""
    blocks = len(numbers)
    thread = np.tile(np.arange(threads, dtype=np.uint32), blocks)
    found = {"%tid.x": thread, "%laneid": thread % np.uint32(32)}
    place = numbers
    for axis, size in zip(_AXES, grid, strict=True):
        found[f"%ctaid.{axis}"] = np.repeat(place % size, threads).astype(np.uint32)
        found[f"%nctaid.{axis}"] = np.full(blocks * threads, size, np.uint32)
        found[f"%ntid.{axis}"] = np.full(blocks * threads, threads if axis == "x" else 1, np.uint32)
        place = place // size
    return {Special(name): values for name, values in found.items()}
