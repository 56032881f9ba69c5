"""Reads of experts into blobs of host memory, on threads.

Whatever interrupts the thread that started a read, a blob is written by one read at a time, and by
the newest last. Knows no slots.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Lock

from torch import Tensor

from qmix.experts.arena import HostArena
from qmix.formats.files.spans import Spread, in_turn
from qmix.weights.blob import READ_BUFFERS
from qmix.weights.expert import Expert

# Of a layer's two chosen experts one is multiplied while the other is read; the next layer's, too.
_THREADS = 2 + READ_BUFFERS
# At the parts of an expert, in the order in which experts were asked for: with one of them missing
# the cores share its copy out of the page cache, and a disk has several requests at a time.
_PART_THREADS = 4


class BlobReads:
    """Reads into the blobs of an arena.

    Args:
        read: reads an expert, by its id over all layers, into a blob, in parts that it hands over.
    """

    def __init__(self, read: Callable[[int, Tensor, Spread], Expert], arena: HostArena) -> None:
        self._read_into, self._arena = read, arena
        self._pool = ThreadPoolExecutor(_THREADS, "qmix-read")
        self._parts = ThreadPoolExecutor(_PART_THREADS, "qmix-read-part")
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

    def drop(self, blob: int) -> None:
        """Nobody wants what is being read into a blob: no further part of it begins."""
        self._newest[blob] = None

    def _read(self, expert: int, blob: int, read: object) -> Expert:
        def check() -> None:
            if self._newest[blob] is not read:
                raise CancelledError

        with self._locks[blob]:
            check()
            return self._read_into(expert, self._arena.blob(blob), partial(self._spread, check))

    def _spread(self, check: Callable[[], None], parts: Sequence[Callable[[], None]]) -> None:
        """Do the parts on threads, and wait for all of them, whatever one has raised.

        Args:
            check: called before each; raises if it is no longer wanted.
        """

        def checked(part: Callable[[], None]) -> None:
            check()
            part()

        try:
            started = [self._parts.submit(checked, part) for part in parts]
        except RuntimeError:  # Python is exiting
            in_turn(parts)
            return
        wait(started)
        for part in started:
            part.result()

    def _read_here(self, expert: int, blob: int, read: object) -> Future[Expert]:
        done: Future[Expert] = Future()
        try:
            done.set_result(self._read(expert, blob, read))
        except Exception as error:  # noqa: BLE001  raised where the result is asked for
            done.set_exception(error)
        return done
