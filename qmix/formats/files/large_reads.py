"""Reads of whole pages of a file, many megabytes at a time, through the page cache or past it.

Past the cache the disk writes straight into the memory that is read into: no core copies, and
nothing that is useful to others is driven out. Knows no tensors.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmix.files.regular_file import UNREADABLE, open_regular
from qmix.formats.files.page_cache import is_cached
from qmix.weights.blob import PAGE_BYTES, aligned

_PIECE_BYTES = 8 << 20  # a disk takes it apart, and a read that nobody wants any more ends soon
_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file, which are read with the rest of their pages."""

    file: Path
    start: int
    stop: int

    @property
    def first(self) -> int:
        """Where the first page begins."""
        return self.start - self.start % PAGE_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return aligned(self.stop, PAGE_BYTES) - self.first

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of parts of the pages, from `first`, that may be read at once."""
        for start in range(0, self.nbytes, _PIECE_BYTES):
            yield start, min(start + _PIECE_BYTES, self.nbytes)


class PageReader:
    """A file that is open for reads of whole pages. Threads may share it.

    Args:
        descriptor: of the file. past: of the same file, opened with O_DIRECT; None: everything is
            read through the cache.
    """

    def __init__(self, descriptor: int, past: int | None) -> None:
        self._descriptor, self._past = descriptor, past

    @property
    def is_past_cache(self) -> bool:
        """Whether `read` leaves the cache as it is."""
        return self._past is not None

    def is_cached(self, start: int, stop: int) -> bool:
        """Whether the cache holds all pages of [start, stop)."""
        return is_cached(self._descriptor, start, stop)

    def copy(self, memory: memoryview, start: int) -> int:
        """`read` through the cache, which holds these pages."""
        return _filled(self._descriptor, memory, start)

    def read(self, memory: memoryview, start: int) -> int:
        """Fill memory from page `start` on; returns the bytes, fewer only at the file's end.

        Past the cache, the memory must begin on a page.
        """
        if self._past is not None:
            with suppress(_NotPossible):
                return _filled(self._past, memory, start)
            self._past = None
        return _filled(self._descriptor, memory, start)


def _filled(descriptor: int, memory: memoryview, start: int) -> int:
    done = 0
    while done < len(memory):
        try:
            nbytes = os.preadv(descriptor, [memory[done:]], start + done)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise _NotPossible from error
            raise
        done += nbytes
        if not nbytes or nbytes % PAGE_BYTES:  # the end
            break
    return done


class _NotPossible(OSError):  # noqa: N818  it is read in the other way
    """The file, or its file system, cannot be read past the cache: its pages are others."""


@contextmanager
def opened(file: Path, *, past_cache: bool, what: str = UNREADABLE) -> Iterator[PageReader]:
    """Open a file for reads of whole pages.

    Args:
        past_cache: where the system and the file system can.
        what: the failure, if the block cannot read the file.

    Raises:
        CheckpointError: as open_regular.
    """
    with open_regular(file, what=what) as stream:
        past = None
        if past_cache and _DIRECT:
            with suppress(OSError):  # such as EINVAL from a file system in memory
                past = os.open(file, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
        try:
            yield PageReader(stream.fileno(), past)
        finally:
            if past is not None:
                os.close(past)
