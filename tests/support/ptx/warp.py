"""Instructions in which the lanes of a warp exchange values.

Lane 4g + t of a warp holds, of a tile, row g and columns 2t and 2t + 1 (PTX ISA, "Matrix fragments
for mma.m16n8k16" and "ldmatrix"); 16-bit values are packed by two, the lower column in the lower
half.
"""

import numpy as np

from tests.support.ptx.packed import widen


def sources(mode, operand, clamp):
    """shfl.sync: the lane from which each lane receives; itself where that is out of range.

    Args:
        operand: a distance or a lane, [lanes].
        clamp: the bound of a segment and, from bit 8 on, the mask of segments.
    """
    lane = np.arange(32)
    segment, bound = clamp >> 8 & 31, clamp & 31
    lowest = lane & segment
    highest = lowest | bound & ~segment
    operand = operand.reshape(-1, 32).astype(np.int64) & 31
    if mode == "up":
        source = lane - operand
        inside = source >= highest  # the bound of `up` is a lower one
    else:
        source = {
            "down": lane + operand,
            "bfly": lane ^ operand,
            "idx": lowest | operand & ~segment,
        }[mode]
        inside = source <= highest
    first = 32 * np.arange(len(operand))[:, None]
    return (first + np.where(inside, source, lane)).reshape(-1)


REDUCTIONS = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def reduce(name, values):
    """redux.sync: every lane receives the reduction over its warp, [lanes] -> [lanes]."""
    total = REDUCTIONS[name](values.reshape(-1, 32), axis=1, dtype=values.dtype)
    return np.repeat(total, 32)


def _floats(bits, kind):
    """uint32 [..., 32 lanes] -> float32 [..., 32 lanes, 2]."""
    halves = np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)
    return widen(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def multiply(a, b, c, kind):
    """mma.m16n8k16: A times B plus C, summed in float32.

    Args:
        a: uint32 [4, warps, 32]: rows g and g + 8 of columns 0 to 7, then of columns 8 to 15.
        b: uint32 [2, warps, 32]: rows 2t and 2t + 1 of column g, then those 8 below.
        c: float32 [4, warps, 32]: columns 2t and 2t + 1 of row g, then of row g + 8.
        kind: "f16" or "bf16", of A and B.
    """
    warps = a.shape[1]
    rows = _floats(a, kind).reshape(2, 2, warps, 8, 4, 2)  # half of K, half of M, warp, g, t, p
    rows = rows.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)
    columns = _floats(b, kind).reshape(2, warps, 8, 4, 2)  # half of K, warp, g, t, p
    columns = columns.transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)
    product = np.matmul(rows, columns).reshape(warps, 2, 8, 4, 2)  # warp, half of M, g, t, p
    return product.transpose(1, 4, 0, 2, 3).reshape(4, warps, 32) + c


def distribute(rows, transposed):
    """ldmatrix: 8 x 8 tiles of 16-bit values to registers.

    Args:
        rows: uint16 [warps, tiles, 8, 8].

    Returns:
        uint32 [tiles, warps, 32].
    """
    warps, tiles = rows.shape[:2]
    if transposed:
        rows = rows.swapaxes(2, 3)
    words = np.ascontiguousarray(rows).view(np.uint32)
    return words.reshape(warps, tiles, 32).swapaxes(0, 1)
