"""How a large weight is decoded: slabs are distributed over threads, tiles fit the cache."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

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


def decoded(
    start: int,
    stop: int,
    width: int,
    dtype: torch.dtype,
    decode: Callable[[int, int, Tensor], None],
) -> Tensor:
    """Rows [start, stop) of `width` elements in CPU memory, on several threads if worth it.

    Args:
        decode: writes rows [first, last) of the weight into a tensor [last - first, width].
    """
    # numpy requests huge pages for large arrays: page faults of 117 MB cost 60 ms less.
    bits = np.empty((stop - start, width), f"i{dtype.itemsize}")

    def decode_slab(first: int) -> None:
        last = min(first + step, stop)
        # Made by this thread: a tensor that another made under inference_mode is read-only here.
        decode(first, last, torch.from_numpy(bits[first - start : last - start]).view(dtype))

    step = max(1, SLAB_ELEMENTS // width)
    _each_slab(decode_slab, range(start, stop, step))
    return torch.from_numpy(bits).view(dtype)


def _each_slab(decode: Callable[[int], None], slabs: range) -> None:
    """Call `decode` with the start of each slab; many slabs use as many threads as torch does."""
    if len(slabs) < _THREADED_SLABS:
        for first in slabs:
            decode(first)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(decode, slabs):
            pass
