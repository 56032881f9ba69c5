# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""A panel of packed rows times tokens: the loop over tiles of all Triton kernels that multiply.

The matrix units sum a group of inputs, and the sum is multiplied by the group's scales once, in
float32. In groups of 16, the inputs of one matrix instruction, weights are multiplied instead.

Knows no kernel. Shape letters: see qmix.kernels.
"""

import triton
import triton.language as tl

from qmix.kernels.gpu.slices_triton import block_inputs
from qmix.kernels.gpu.tiles_triton import (
    BYTE_ROWS,
    HEADER,
    bits_of,
    codes_at,
    decode,
    decoding_words,
    load_blocks,
    load_planes,
    of_inputs,
    operand,
    pair_places,
    plane_pairs,
    tile_words,
)


@triton.jit
def accumulate(
    matrix, x, x_row, panel, part, first, last, K,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both planes of a panel times x over tiles [first, last): two float32 [rows, COLUMNS].

    x_row [COLUMNS] are the offsets of rows of x. A column that nobody wants reads one of them too:
    a mask in the loop would cost four instructions a tile. `part` is which WARPS of the panel's
    four warps.
    """
    ROWS: tl.constexpr = WARPS * 16
    CODES: tl.constexpr = BYTE_ROWS * C * bits_of(KIND) // 4
    SCALES: tl.constexpr = BYTE_ROWS * 4 * (C // GROUP)
    TILE: tl.constexpr = CODES + (SCALES if SYMMETRIC else 2 * SCALES)
    WIDTH: tl.constexpr = block_inputs(KIND, C)
    BLOCKS: tl.constexpr = C // WIDTH
    SPAN: tl.constexpr = GROUP if GROUP < WIDTH else WIDTH  # inputs of a block that share a scale
    EACH: tl.constexpr = GROUP // SPAN if GROUP > WIDTH else 1  # blocks with the same scales
    places = codes_at(part, WARPS, WIDTH // 32)
    inputs = tl.arange(0, WIDTH)
    pairs = pair_places(part * ROWS + tl.arange(0, ROWS), WIDTH, SPAN)
    tile = matrix + HEADER + (panel.to(tl.int64) * (K // C) + first) * TILE
    x = x + x_row[None, :] + first * C + inputs[:, None]
    low = tl.zeros([ROWS, COLUMNS], tl.float32)
    high = tl.zeros([ROWS, COLUMNS], tl.float32)
    table = decoding_words(matrix, KIND)
    scales = plane_pairs(tile + CODES, pairs)
    # With the number of stages set on the loop, scales are copied asynchronously too.
    for _ in tl.range(0, last - first, num_stages=STAGES):
        words = tile_words(tile, places, KIND, C)
        tokens = load_blocks(x, WIDTH, BLOCKS)
        scaled = load_planes(scales, WIDTH // SPAN, BLOCKS, EACH)
        values = decode(words, table, KIND)
        zeros = scaled
        if not SYMMETRIC:
            section = plane_pairs(tile + CODES + SCALES, pairs)
            zeros = load_planes(section, WIDTH // SPAN, BLOCKS, EACH)
        low_sum, high_sum = low, high  # of a group; they begin anew with each
        for block in tl.static_range(BLOCKS):
            low, low_sum = _add_block(
                low, low_sum, operand(values[2 * block], WARPS, WIDTH // 32), tokens[block],
                scaled[2 * block], zeros[2 * block], block * WIDTH, WIDTH, GROUP, SYMMETRIC,
            )  # fmt: skip
            high, high_sum = _add_block(
                high, high_sum, operand(values[2 * block + 1], WARPS, WIDTH // 32), tokens[block],
                scaled[2 * block + 1], zeros[2 * block + 1], block * WIDTH, WIDTH, GROUP, SYMMETRIC,
            )  # fmt: skip
        tile += TILE
        scales += TILE // 4
        x += C
    factors = matrix.to(tl.pointer_type(tl.float32))
    return low * tl.load(factors), high * tl.load(factors + 1)


@triton.jit
def _add_block(
    total, part, weight, tokens, scale, zero,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """The sums of all groups, and of the last one, with a block: inputs from FIRST on."""
    if not SYMMETRIC:
        weight += of_inputs(zero, WIDTH, GROUP if GROUP < WIDTH else WIDTH)
    if GROUP < WIDTH:
        total = tl.dot(weight * of_inputs(scale, WIDTH, GROUP), tokens, total)
    else:
        part = tl.dot(weight, tokens) if FIRST % GROUP == 0 else tl.dot(weight, tokens, part)
        if (FIRST + WIDTH) % GROUP == 0:
            total += part * scale.to(tl.float32)[:, None]
    return total, part
