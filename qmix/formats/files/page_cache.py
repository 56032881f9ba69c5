"""Which pages of a file the page cache holds: nothing is read to find that out.

A read with RWF_NOWAIT, which says it too, has Linux 6.18 read 8 MiB ahead all the same.
"""

import ctypes
import mmap
from functools import cache

_FAILED = ctypes.c_void_p(-1).value


def cached_pages(descriptor: int, start: int, nbytes: int) -> bytes:
    """A byte for each page of a part of a file, odd if the cache holds it; all 0 if nobody knows.

    Of a file that is others' Linux says that it is all there.

    Args:
        start: of a page.
    """
    pages = -(-nbytes // mmap.PAGESIZE)
    system = _system()
    found = ctypes.create_string_buffer(pages)
    address = system.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)
    if address == _FAILED:
        return bytes(pages)
    try:
        failed = system.mincore(address, nbytes, found)
    finally:
        system.munmap(address, nbytes)
    return bytes(pages) if failed else found.raw


def is_cached(descriptor: int, start: int, stop: int) -> bool:
    """Whether the cache holds all pages with bytes of [start, stop)."""
    first = start - start % mmap.PAGESIZE
    return all(page & 1 for page in cached_pages(descriptor, first, stop - first))


@cache
def _system() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    size, pointer, whole = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.mmap.argtypes = [pointer, size, whole, whole, whole, ctypes.c_long]
    library.mmap.restype = pointer
    library.mincore.argtypes = [pointer, size, ctypes.c_char_p]
    library.munmap.argtypes = [pointer, size]
    return library
