"""The registers of all lanes, and the lanes that an instruction runs for.

A register is an array of unsigned integers of its width (bool for a predicate), one element a lane.
Arrays are never changed in place, so that registers may share them.
"""

from contextlib import contextmanager

import numpy as np

from tests.support.ptx.errors import DivergenceError, UninitialisedError, UnknownInstructionError
from tests.support.ptx.operations import TYPES
from tests.support.ptx.source import Immediate, Register

_UNSIGNED = {1: np.dtype(bool), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}


class Lanes:
    """Registers of `count` lanes.

    A value that was computed from a register that its lane never wrote is undefined too. That is
    no error until it decides something: an address, a branch, what is stored. (Triton's reductions
    leave lanes undefined, and drop what those compute.)

    Attributes:
        active: bool [count], the lanes that the current instruction runs for.
        indices: int64, their numbers.
    """

    def __init__(self, count, registers, specials):
        """`specials` are the values of special registers, uint32 [count], by name."""
        self.count = count
        self._values = [None] * registers
        self._defined = [None] * registers  # None, True, or in which lanes
        self._parts = {}  # of registers that were joined from undefined parts: those parts
        self._undefined = None  # None, or in which lanes a source of the current instruction is
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

    def begin(self):
        """An instruction begins that has read nothing yet."""
        self._undefined = None

    @contextmanager
    def guarded(self, guard):
        """Run for those active lanes whose predicate has the wanted value; yields if any has."""
        register, wanted = guard
        before = self.active, self._is_whole, self.indices
        self.run_for(before[0] & (self.demand(register, "pred") == wanted))
        yield len(self.indices) > 0
        self.active, self._is_whole, self.indices = before

    def read(self, operand, kind):
        """An operand as values of a type: [count], or one value for all."""
        dtype = TYPES[kind]
        if isinstance(operand, Register):
            defined = self._defined[operand.index]
            if defined is not True:
                self.leave([operand])
                before = False if self._undefined is None else self._undefined
                self._undefined = before | ~self._defined[operand.index]
            values = self._values[operand.index]
            if values.dtype.itemsize != dtype.itemsize or (dtype.kind == "b") != (
                operand.width == 1
            ):
                raise UnknownInstructionError(
                    f"{operand.name} has {operand.width} bits, not {kind}"
                )
            return values.view(dtype)
        if isinstance(operand, Immediate):
            if dtype.kind == "b":
                return np.bool_(operand.bits)
            bits = operand.bits & ((1 << 8 * dtype.itemsize) - 1)
            return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]
        if operand in self._specials:
            return self._specials[operand].view(dtype)
        raise UnknownInstructionError(f"operand {operand}")

    def demand(self, operand, kind):
        """As `read`, of an operand that must be defined in all active lanes."""
        values = self.read(operand, kind)
        if isinstance(operand, Register):
            defined = self._defined[operand.index]
            if defined is not True and (self.active & ~defined).any():
                raise UninitialisedError(f"register {operand.name}")
        return values

    def demand_bits(self, operand, bits):
        """The low `bits` of an operand, which may be wider, unsigned."""
        width = max(operand.width, bits) if isinstance(operand, Register) else bits
        return self.demand(operand, f"b{width}").astype(f"u{bits // 8}")

    def write(self, register, values):
        """Values of the register's width, [count] or one for all, for the active lanes."""
        if register is None:
            return
        values = np.asarray(values)
        dtype = _UNSIGNED[register.width]
        if values.dtype.itemsize != dtype.itemsize or (dtype.kind == "b") != (
            values.dtype.kind == "b"
        ):
            raise UnknownInstructionError(
                f"{values.dtype} to {register.name} of {register.width} bits"
            )
        values = values.view(dtype)
        if values.ndim == 0:
            values = np.full(self.count, values)
        index, before = register.index, self._defined[register.index]
        self._parts.pop(index, None)
        if self._is_whole or before is None:
            self._values[index] = values
        else:
            self._values[index] = np.where(self.active, values, self._values[index])
        if self._is_whole and self._undefined is None:
            self._defined[index] = True
            return
        defined = self.active if self._undefined is None else self.active & ~self._undefined
        if not self._is_whole and before is not None:
            defined = defined | (before & ~self.active)
        self._defined[index] = True if (defined | ~self._live).all() else defined

    def leave(self, registers):
        """Those of these registers that no lane ever wrote are undefined in all."""
        for register in registers:
            if isinstance(register, Register) and self._defined[register.index] is None:
                self._values[register.index] = np.zeros(self.count, _UNSIGNED[register.width])
                self._defined[register.index] = np.zeros(self.count, bool)

    def join(self, register, parts):
        """mov of narrower operands, the lowest first. Which of them are undefined is kept."""
        values, undefined = [], []
        for part in parts:
            self.begin()
            values.append(self.read(part, f"b{register.width // len(parts)}"))
            undefined.append(self._undefined)
        masks = [mask for mask in undefined if mask is not None]
        self._undefined = np.logical_or.reduce(masks) if masks else None
        joined = np.stack(np.broadcast_arrays(*values), -1)
        self.write(register, joined.view(f"u{register.width // 8}")[..., 0])
        if masks and self._is_whole:
            self._parts[register.index] = undefined

    def split(self, registers, operand):
        """mov to narrower registers, the lowest first."""
        values = np.atleast_1d(self.read(operand, f"b{operand.width}"))
        parts = values[:, None].view(f"u{operand.width // 8 // len(registers)}")
        undefined = self._parts.get(operand.index)
        for place, register in enumerate(registers):
            if undefined is not None:
                self._undefined = undefined[place]
            self.write(register, np.ascontiguousarray(parts[:, place]))

    def moved(self, move):
        """What is undefined moves between lanes as values do: [count] -> [count]."""
        if self._undefined is not None:
            self._undefined = move(self._undefined)

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
            raise DivergenceError(f"{what} without all of its threads")
