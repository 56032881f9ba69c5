"""Shared memory of several thread blocks, and who wrote and read it since which barrier.

Threads of a block run in lockstep here, which no GPU promises. So every use is checked against the
order that the program itself demands: a write is visible to another thread once both have passed a
barrier after it, and memory that another thread has read may be written only after such a barrier.
An asynchronous copy is visible to its own thread once its group was waited for, and to others after
a barrier behind that. `bar.warp.sync` is a barrier between the lanes of a warp.

Bookkeeping is by granule: the narrowest access of the program.
"""

import numpy as np

from tests.support.ptx.errors import OutOfBoundsError, RaceError, UninitialisedError, UnwaitedError
from tests.support.ptx.memory import check_alignment

_NOBODY, _SEVERAL = -1, -2
_NEVER = np.iinfo(np.int32).max  # the time of a copy that was not waited for


class SharedMemory:
    """`nbytes` for each thread block; a lane is a thread of any block."""

    def __init__(self, clocks, nbytes, granule):
        self.nbytes, self.granule = nbytes, granule
        self._clocks, lanes = clocks, clocks.lanes
        self._stride = -(-nbytes // 16) * 16
        self._bytes = np.zeros(lanes // clocks.threads * self._stride, np.uint8)
        granules = len(self._bytes) // granule

        def marks(value):
            return np.full(granules, value, np.int32)

        self._writer, self._written, self._written_in_warp = marks(_NOBODY), marks(0), marks(0)
        self._group = marks(_NOBODY)  # of the writer's asynchronous copies
        self._reader, self._reading_warp = marks(_NOBODY), marks(_NOBODY)
        self._read, self._read_in_warp = marks(-1), marks(-1)
        self._committed = np.zeros(lanes, np.int32)
        self._done, self._done_in_warp = np.full((2, lanes, 1), _NEVER, np.int32)

    def commit(self, lanes):
        """The copies of these lanes that belong to no group yet become one."""
        self._committed[lanes] += 1
        if self._committed.max() >= self._done.shape[1]:
            more = np.full_like(self._done, _NEVER)
            self._done = np.concatenate((self._done, more), 1)
            self._done_in_warp = np.concatenate((self._done_in_warp, more), 1)

    def wait(self, lanes, pending):
        """All but the last `pending` groups of these lanes are complete."""
        complete = np.arange(self._done.shape[1]) < self._committed[lanes, None] - pending
        for done, time in (
            (self._done, self._clocks.time),
            (self._done_in_warp, self._clocks.warp_time),
        ):
            rows = done[lanes]
            done[lanes] = np.where(complete & (rows == _NEVER), time[lanes, None], rows)

    def load(self, lanes, addresses, dtype, count, collective=False):
        """[lanes, count] values. `collective`: each value goes to other lanes of the warp too."""
        rows, places, granules = self._rows(lanes, addresses, dtype, count)
        self._check_visible(granules, lanes, collective)
        self._note_read(granules, lanes, collective)
        return rows[places]

    def store(self, lanes, addresses, values, asynchronous=False):
        """Store [lanes, count]; two threads at one address must agree."""
        rows, places, granules = self._rows(lanes, addresses, values.dtype, values.shape[1])
        self._check_unread(granules, lanes)
        self._check_visible(granules, lanes, False, or_unwritten=True)
        rows[places] = values
        if (rows[places] != values).any():
            raise RaceError("two threads store different values at one address in one instruction")
        self._writer[granules] = lanes[:, None]
        self._written[granules] = self._clocks.time[lanes, None]
        self._written_in_warp[granules] = self._clocks.warp_time[lanes, None]
        self._group[granules] = self._committed[lanes, None] if asynchronous else _NOBODY

    def _rows(self, lanes, addresses, dtype, count):
        nbytes = dtype.itemsize * count
        addresses = addresses.astype(np.int64)
        check_alignment(addresses, nbytes)
        if (addresses + nbytes > self.nbytes).any():
            wrong = addresses[addresses + nbytes > self.nbytes][0]
            raise OutOfBoundsError(f"shared address {wrong:#x}, {nbytes} bytes of {self.nbytes}")
        addresses = addresses + lanes // self._clocks.threads * self._stride
        granules = addresses[:, None] // self.granule + np.arange(nbytes // self.granule)
        return self._bytes.view(dtype).reshape(-1, count), addresses // nbytes, granules

    def _check_visible(self, granules, lanes, collective, or_unwritten=False):
        """Whatever wrote these granules must be over, as these lanes see it."""
        writer, group = self._writer[granules], self._group[granules]
        if not or_unwritten and (writer == _NOBODY).any():
            raise UninitialisedError("shared memory that nothing wrote")
        time, warp_time = self._written[granules], self._written_in_warp[granules]
        copied = group != _NOBODY
        if copied.any():
            time = np.where(copied, self._done[writer, group], time)
            warp_time = np.where(copied, self._done_in_warp[writer, group], warp_time)
            if (time == _NEVER).any():
                raise UnwaitedError("shared memory whose asynchronous copy was not waited for")
        lane = lanes[:, None]
        visible = (time < self._clocks.time[lane]) | (writer == _NOBODY)
        visible |= (writer // 32 == lane // 32) & (warp_time < self._clocks.warp_time[lane])
        if not collective:
            visible |= writer == lane
        if not visible.all():
            raise RaceError("shared memory that another thread wrote, without a barrier since")

    def _check_unread(self, granules, lanes):
        """No other thread may have read these granules since the last barrier."""
        lane = lanes[:, None]
        safe = (self._read[granules] < self._clocks.time[lane]) | (self._reader[granules] == lane)
        same_warp = self._reading_warp[granules] == lane // 32
        safe |= same_warp & (self._read_in_warp[granules] < self._clocks.warp_time[lane])
        if not safe.all():
            raise RaceError("a store to shared memory that another thread reads, without a barrier")

    def _note_read(self, granules, lanes, collective):
        lane, warp = lanes[:, None], lanes[:, None] // 32
        again = self._read[granules] == self._clocks.time[lane]
        reader, reading_warp = self._reader[granules], self._reading_warp[granules]
        self._reader[granules] = lane
        self._reading_warp[granules] = warp
        # One lane of those that read a granule now is kept; the others find another's number.
        other = again & (reader != lane) | (self._reader[granules] != lane) | collective
        other_warp = again & (reading_warp != warp) | (self._reading_warp[granules] != warp)
        self._reader[granules[other]] = _SEVERAL
        self._reading_warp[granules[other_warp]] = _SEVERAL
        self._read[granules] = self._clocks.time[lane]
        self._read_in_warp[granules] = self._clocks.warp_time[lane]
