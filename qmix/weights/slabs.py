"""How a large weight is decoded: slabs are distributed over threads, tiles fit the cache."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

# All are multiples of every block size. From 32768 elements on, torch splits an operation over its
# own threads, which would compete with ours. The float32 values of a tile take 1.8 MB; with half of
# that, threads wait longer for the interpreter's lock (encoding is slower by
# 10 to 30 %, decoding by 10 %). Starting threads takes 0.1 ms, a slab 4 ms.
SERIAL_ELEMENTS = 7 * 4096
TILE_ELEMENTS = 16 * SERIAL_ELEMENTS
SLAB_ELEMENTS = 8 * TILE_ELEMENTS
_THREADED_SLABS = 4
# Elements that the generic path decodes at a time: its float32 and index copies stay below 100 MB.
DEVICE_ELEMENTS = 2048 * 4096


def each_slab(decode: Callable[[int], None], slabs: range) -> None:
    """Call `decode` with the start of each slab; many slabs use as many threads as torch does."""
    if len(slabs) < _THREADED_SLABS:
        for first in slabs:
            decode(first)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(decode, slabs):
            pass
