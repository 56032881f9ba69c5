"""Reads of experts into blobs of host memory, on threads.

Whatever interrupts the thread that started a read, a blob is written by one read at a time, and by
the newest last. Knows no slots.
"""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Lock

from torch import Tensor

from qmix.experts.arena import HostArena
from qmix.weights.expert import Expert

# Of a layer's two chosen experts one is multiplied while the other is read. Where it was measured
# (8x7B, 4 GiB, most of the file in the page cache) one thread and two differed by less than the
# scatter.
_THREADS = 2


class BlobReads:
    """Reads into the blobs of an arena.

    Args:
        read: reads an expert, by its id over all layers, into a blob.
    """

    def __init__(self, read: Callable[[int, Tensor], Expert], arena: HostArena) -> None:
        self._read_into, self._arena = read, arena
        self._pool = ThreadPoolExecutor(_THREADS, "qmix-read")
        self._locks = [Lock() for _ in range(len(arena))]
        self._newest: list[object] = [None] * len(arena)  # the read that each blob is for

    def start(self, expert: int, blob: int) -> Future[Expert]:
        """Start to read an expert into a blob, whose last expert is no longer needed.

        The read waits for one that is still writing there. One that has not begun is dropped.
        """
        read = self._newest[blob] = object()
        try:
            return self._pool.submit(self._read, expert, blob, read)
        except RuntimeError:  # Python is exiting, and this thread still generates
            return self._read_here(expert, blob, read)

    def _read(self, expert: int, blob: int, read: object) -> Expert:
        with self._locks[blob]:
            if self._newest[blob] is not read:
                raise CancelledError
            return self._read_into(expert, self._arena.blob(blob))

    def _read_here(self, expert: int, blob: int, read: object) -> Future[Expert]:
        done: Future[Expert] = Future()
        try:
            done.set_result(self._read(expert, blob, read))
        except Exception as error:  # noqa: BLE001  raised where the result is asked for
            done.set_exception(error)
        return done
