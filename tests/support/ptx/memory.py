"""Global memory: the bytes of the tensors that a launch may use, in this process's memory."""

import numpy as np

from tests.support.ptx.errors import MisalignedError, OutOfBoundsError, RaceError
from tests.support.ptx.order import GRANULE, Stores

_FIRST = 16  # numpy takes no array at address 0


class _Process:
    """All addresses of this process as one array of bytes; only checked ones may be touched."""

    def __init__(self):
        shape, data = ((1 << 47) - _FIRST,), (_FIRST, False)
        self.__array_interface__ = {"shape": shape, "typestr": "|u1", "data": data, "version": 3}


def check_alignment(addresses, nbytes):
    """Raise unless all addresses are multiples of `nbytes`."""
    if (addresses & np.asarray(nbytes - 1, addresses.dtype)).any():
        wrong = addresses[addresses % nbytes != 0][0]
        raise MisalignedError(f"address {wrong:#x}, {nbytes} bytes")


class GlobalMemory:
    """Bytes [start, end) of some buffers; every other address is an error."""

    def __init__(self, buffers):
        ends, starts = [], []
        for start, nbytes in sorted(buffers):
            if ends and start <= ends[-1] and nbytes:  # views of one tensor
                ends[-1] = max(ends[-1], start + nbytes)
            elif nbytes:
                starts.append(start)
                ends.append(start + nbytes)
        self._starts = np.array(starts, np.uint64)
        self._ends = np.array(ends, np.uint64)
        self._bytes = np.asarray(_Process())
        self._stores = Stores()

    def load(self, addresses, dtype, count, lanes, clocks):
        """`count` consecutive values at each address, for a lane each: [addresses, count]."""
        rows, places = self._rows(addresses, dtype, count)
        for buffer, chosen, granules, _ in self._granules(addresses, dtype.itemsize * count):
            self._stores.check(buffer, granules, lanes[chosen], clocks)
        return rows[places]

    def store(self, addresses, values, lanes, clocks):
        """Store [addresses, count], a lane each; two threads at one address must agree."""
        rows, places = self._rows(addresses, values.dtype, values.shape[1])
        nbytes = values.dtype.itemsize * values.shape[1]
        for buffer, chosen, granules, size in self._granules(addresses, nbytes):
            self._stores.check(buffer, granules, lanes[chosen], clocks)
            self._stores.note(buffer, size, granules, lanes[chosen], clocks)
        rows[places] = values
        if (rows[places] != values).any():
            raise RaceError("two threads store different values at one address in one instruction")

    def atomic(self, addresses, values, function, lanes, clocks):
        """One lane after the other: the old values [addresses], which `function` combines."""
        found = np.empty_like(values)
        rows, places = self._rows(addresses, values.dtype, 1)
        for at, place in enumerate(places):
            found[at] = rows[place, 0]
            rows[place, 0] = function(found[at], values[at])
            self._stores.atomic(int(addresses[at]), int(lanes[at]), clocks)
        return found

    def _granules(self, addresses, nbytes):
        """Of each buffer in turn: its number, which addresses, their granules, and how many."""
        buffers = np.searchsorted(self._starts, addresses, "right") - 1
        for buffer in np.unique(buffers):
            chosen = buffers == buffer
            start, end = self._starts[buffer], self._ends[buffer]
            first = ((addresses[chosen] - start) // np.uint64(GRANULE)).astype(np.int64)
            granules = first[:, None] + np.arange(max(1, nbytes // GRANULE))
            yield int(buffer), chosen, granules, int(end - start) // GRANULE + 1

    def _rows(self, addresses, dtype, count):
        nbytes = dtype.itemsize * count
        check_alignment(addresses, nbytes)
        place = np.searchsorted(self._starts, addresses, "right") - 1
        inside = place >= 0
        if inside.all() and len(self._ends):
            inside = addresses + np.uint64(nbytes) <= self._ends[place]
        if not inside.all():
            raise OutOfBoundsError(f"global address {addresses[~inside][0]:#x}, {nbytes} bytes")
        whole = len(self._bytes) // nbytes * nbytes
        rows = self._bytes[:whole].view(dtype).reshape(-1, count)
        return rows, (addresses - np.uint64(_FIRST)) // np.uint64(nbytes)
