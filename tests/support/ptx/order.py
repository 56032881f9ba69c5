"""Which stores to global memory a thread may rely on, within one launch.

A thread sees its own stores, those of its block from before a barrier, and those of another block
that were released to it: an atomic of the other block came after its stores and a barrier, and an
atomic at the same address in its own block came later, again with a barrier behind it. (PTX ISA,
"Memory consistency model": acq_rel atomics at the scope of the device, and bar.sync.) Granules of
two bytes.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.support.ptx.errors import RaceError

GRANULE = 2
_NOBODY = -1


@dataclass
class Clocks:
    """How many barriers each lane has passed.

    Attributes:
        first: the number of lane 0 among all threads of the grid.
        threads: of a block.
        time: barriers of the block; int32 [lanes].
        warp_time: barriers of the block or the warp.
    """

    first: int
    threads: int
    lanes: int
    time: np.ndarray = field(init=False)
    warp_time: np.ndarray = field(init=False)

    def __post_init__(self):
        self.time, self.warp_time = np.zeros((2, self.lanes), np.int32)

    def barrier(self, lanes, of_warp=False):
        """These lanes, which are whole blocks (or warps), have met."""
        self.warp_time[lanes] += 1
        if not of_warp:
            self.time[lanes] += 1


class Stores:
    """The stores of a launch: who made them and when, and who was told."""

    def __init__(self):
        self._marks = {}  # by buffer: writer, its time and its warp's time, of each granule
        self._released = {}  # by address: block -> (time, thread) of its atomic
        self._known = {}  # (block, other block): (time, thread) released, acquiring thread, its time

    def note(self, buffer, size, granules, lanes, clocks):
        """These lanes store to granules [lanes, n] of a buffer of `size` granules."""
        if buffer not in self._marks:
            self._marks[buffer] = np.full((3, size), _NOBODY, np.int32)
        writer, time, warp_time = self._marks[buffer]
        writer[granules] = clocks.first + lanes[:, None]
        time[granules] = clocks.time[lanes, None]
        warp_time[granules] = clocks.warp_time[lanes, None]

    def check(self, buffer, granules, lanes, clocks):
        """Raise unless these lanes see the last stores to these granules."""
        if buffer not in self._marks:
            return
        writer, time, warp_time = (marks[granules] for marks in self._marks[buffer])
        reader = clocks.first + lanes[:, None]
        seen = (writer == _NOBODY) | (writer == reader)
        in_block = writer // clocks.threads == reader // clocks.threads
        seen |= in_block & (time < clocks.time[lanes, None])
        seen |= (writer // 32 == reader // 32) & (warp_time < clocks.warp_time[lanes, None])
        for at, number in zip(*np.nonzero(~seen), strict=True):
            lane, store = lanes[at], (writer[at, number], time[at, number])
            if not self._was_told(clocks.first + lane, clocks.time[lane], *store, clocks.threads):
                raise RaceError("global memory that another thread stored, without an order since")

    def _was_told(self, reader, now, writer, time, threads):
        known = self._known.get((reader // threads, writer // threads))
        if known is None:
            return False
        (released, releaser), acquirer, acquired = known
        was_released = time < released or (writer == releaser and time == released)
        return was_released and (acquirer == reader or acquired < now)

    def atomic(self, address, lane, clocks):
        """An acq_rel atomic of one lane: it acquires what others released here, and releases."""
        thread, now = clocks.first + lane, clocks.time[lane]
        block = thread // clocks.threads
        here = self._released.setdefault(address, {})
        for other, released in here.items():
            if other != block:
                self._known[block, other] = (released, thread, now)
        for (knower, other), (released, acquirer, acquired) in self._known.items():
            if knower == block and (acquirer == thread or acquired < now):
                here[other] = max(here.get(other, released), released)
        here[block] = (now, thread)
