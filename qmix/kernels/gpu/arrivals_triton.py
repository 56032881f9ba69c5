# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201
"""Which thread block of several finishes what they all computed: the one that arrives last.

It saves the launch that would read their results. The blocks store them, then count themselves in
an int32 of the device; the last one reads all results in an order that is fixed, so that the same
arguments give the same bits whichever block it is. Knows nothing of what they compute.
"""

import triton
import triton.language as tl


@triton.jit
def is_last(arrivals, count):
    """Whether the other blocks of `count` that share a counter have stored what they computed.

    The counter was zero before the first arrives, and is zero after the last. What the others
    stored is to be read with cache_modifier ".cg": a first-level cache may hold what was there.
    """
    tl.debug_barrier()  # the stores of all threads come before the one thread that counts
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(arrivals, 0)
    return last
