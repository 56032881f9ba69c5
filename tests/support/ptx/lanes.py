"""The registers of all lanes, and the lanes that an instruction runs for.

A register is an array of unsigned integers of its width (bool for a predicate), one element a lane.
Arrays are never changed in place, so that registers may share them.
"""

from contextlib import contextmanager

import numpy as np

from tests.support.ptx.faults import Divergence, Uninitialised, UnknownInstruction
from tests.support.ptx.operations import TYPES
from tests.support.ptx.source import Immediate, Register

_UNSIGNED = {1: np.dtype(bool), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}


class Lanes:
    """Registers of `count` lanes.

    Attributes:
        active: bool [count], the lanes that the current instruction runs for.
        indices: int64, their numbers.
    """

    def __init__(self, count, registers, specials):
        """`specials` are the values of special registers, uint32 [count], by name."""
        self.count = count
        self._values = [None] * registers
        self._written = [None] * registers  # None, True, or the lanes that wrote
        self._specials = specials
        self._live = np.ones(count, bool)
        self._all = np.arange(count)
        self.run_for(self._live)

    def run_for(self, active):
        """The next instructions run for these lanes only."""
        self.active = active
        self._is_whole = bool(active.all()) or bool((active == self._live).all())
        self.indices = self._all if active.all() else np.flatnonzero(active)

    def end(self):
        """The active lanes have returned."""
        self._live = self._live & ~self.active

    @contextmanager
    def guarded(self, guard):
        """Run for those active lanes whose predicate has the wanted value; yields if any has."""
        register, wanted = guard
        before = self.active, self._is_whole, self.indices
        self.run_for(before[0] & (self.read(register, "pred") == wanted))
        yield len(self.indices) > 0
        self.active, self._is_whole, self.indices = before

    def read(self, operand, kind):
        """An operand as values of a type: [count], or one value for all."""
        dtype = TYPES[kind]
        if isinstance(operand, Register):
            written = self._written[operand.index]
            if written is not True and (written is None or (self.active & ~written).any()):
                raise Uninitialised(f"register {operand.name}")
            values = self._values[operand.index]
            if values.dtype.itemsize != dtype.itemsize or (dtype == bool) != (operand.width == 1):
                raise UnknownInstruction(f"{operand.name} has {operand.width} bits, not {kind}")
            return values.view(dtype)
        if isinstance(operand, Immediate):
            if dtype == bool:
                return np.bool_(operand.bits)
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]
        if operand in self._specials:
            return self._specials[operand].view(dtype)
        raise UnknownInstruction(f"operand {operand}")

    def read_bits(self, operand, bits):
        """The low `bits` of an operand, which may be wider, unsigned."""
        width = max(operand.width, bits) if isinstance(operand, Register) else bits
        return self.read(operand, f"b{width}").astype(f"u{bits // 8}")

    def write(self, register, values):
        """Values of the register's width, [count] or one for all, for the active lanes."""
        if register is None:
            return
        values = np.asarray(values)
        dtype = _UNSIGNED[register.width]
        if values.dtype.itemsize != dtype.itemsize or (dtype == bool) != (values.dtype == bool):
            raise UnknownInstruction(f"{values.dtype} to {register.name} of {register.width} bits")
        values = values.view(dtype)
        if values.ndim == 0:
            values = np.full(self.count, values)
        index = register.index
        if self._is_whole:
            self._values[index], self._written[index] = values, True
            return
        written = self._written[index]
        if written is None:
            self._values[index], self._written[index] = values, self.active
            return
        self._values[index] = np.where(self.active, values, self._values[index])
        if written is not True:
            written = written | self.active
            self._written[index] = True if (written | ~self._live).all() else written

    def spread(self, values):
        """Values of the active lanes, [active, ...], as [count, ...]."""
        if len(self.indices) == self.count:
            return values
        everywhere = np.zeros((self.count, *values.shape[1:]), values.dtype)
        everywhere[self.indices] = values
        return everywhere

    def of_active(self, values):
        """[count], or one value for all, as [active]."""
        if np.ndim(values) == 0:
            return np.full(len(self.indices), values)
        return values if len(self.indices) == self.count else values[self.indices]

    def check_together(self, size, what):
        """Raise unless of every `size` live lanes all are active or none is."""
        missing = (self._live & ~self.active).reshape(-1, size).any(1)
        if (missing & self.active.reshape(-1, size).any(1)).any():
            raise Divergence(f"{what} without all of its threads")
