"""How a large weight is decoded: in slabs over threads, in tiles that fit the cache."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# All are multiples of every block size. From 32768 elements on torch splits an operation over its own
# threads, which would fight with ours. A tile's float32 values take 1.8 MB; with half of that the
# threads wait longer for the interpreter's lock (encoding 10 to 30 % slower, decoding 10 %). Starting
# threads takes 0.1 ms, a slab 4 ms.
SERIAL_ELEMENTS = 7 * 4096
TILE_ELEMENTS = 16 * SERIAL_ELEMENTS
SLAB_ELEMENTS = 8 * TILE_ELEMENTS
_THREADED_SLABS = 4
# Work of the generic path at a time: bounds its float32 and index copies at 100 MB.
DEVICE_ELEMENTS = 2048 * 4096


def each_slab(decode: Callable[[int], None], slabs: range) -> None:
    """Call `decode` with the start of each slab, on torch's number of threads if there are many."""
    if len(slabs) < _THREADED_SLABS:
        for first in slabs:
            decode(first)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(decode, slabs):
            pass
