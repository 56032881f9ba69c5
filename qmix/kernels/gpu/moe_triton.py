# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, RET505
"""The Triton kernels of packed matmuls: what one thread block does. Started by kernels.gpu.moe.

A block owns WARPS * 16 byte rows (twice as many matrix rows: a low and a high plane) and COLUMNS
tokens. Weights are the first operand of the matrix instruction and tokens the second, so that few
tokens fill a tile that is 8 or 16 wide, where the other way round it would be 64 or more high.

Activations are float16. Its 11 bits of mantissa hold a bfloat16 activation exactly. The tables are
float16 too.

Shape letters: see qmix.kernels.
"""

import triton
import triton.language as tl

from qmix.kernels.gpu.arrivals_triton import is_last
from qmix.kernels.gpu.dependent_triton import await_previous, prefetch
from qmix.kernels.gpu.panel_triton import accumulate
from qmix.kernels.gpu.slices_triton import block_inputs
from qmix.kernels.gpu.tiles_triton import (
    BYTE_ROWS,
    HEADER,
    bits_of,
    both_planes,
    codes_at,
    decode,
    decoding_words,
    of_inputs,
    operand,
    pair_places,
    plane_pairs,
    tile_words,
)

# These change from step to step: 1 and multiples of 16 get no compilation of their own.
_COUNTS = ["T", "M", "SPLITS", "expert"]
_UNALIGNED = ["addresses"]  # a layer's row of a table


@triton.jit
def _matrix(addresses, expert, offset):
    """The matrix of an expert, found by its address. The hint keeps 128-bit loads."""
    address = tl.load(addresses + expert) + offset
    return tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)


@triton.jit
def columns_of(
    ids, order, starts, blocks, group, T,
    CHOICES: tl.constexpr, E: tl.constexpr, COLUMNS: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """The expert and the pairs of a group: (expert, pair [COLUMNS], used [COLUMNS]).

    Not sorted: the group is the `group`-th, in ascending order, of the experts that any token
        chose; column t is token t, and its pair the first of the token's choices of this expert.
        Sorted: the columns are a block of pairs in `order`. Where there is no such group, no column
        is used.
    """
    at = tl.arange(0, COLUMNS)
    experts = tl.arange(0, E)
    if SORTED:
        expert = tl.sum((tl.load(blocks + 1 + experts) <= group).to(tl.int32), 0)
        here = tl.minimum(expert, E - 1)
        at += tl.load(starts + here) + (group - tl.load(blocks + here)) * COLUMNS
        used = (at < tl.load(starts + here + 1)) & (expert < E)
        return here, tl.load(order + at, mask=used, other=0), used
    else:
        hits = tl.zeros([E], tl.int32)
        for choice in tl.static_range(CHOICES):
            chosen = tl.load(ids + at * CHOICES + choice, mask=at < T, other=-1).to(tl.int32)
            hits += tl.sum((chosen[:, None] == experts[None, :]).to(tl.int32), 0)
        rank = tl.cumsum((hits > 0).to(tl.int32), 0)
        expert = tl.sum(tl.where((hits > 0) & (rank == group + 1), experts + 1, 0), 0) - 1
        pair = at * 0 - 1
        for back in tl.static_range(1, CHOICES + 1):
            last = at * CHOICES + CHOICES - back
            chosen = tl.load(ids + last, mask=at < T, other=-2).to(tl.int32)
            pair = tl.where(chosen == expert, last, pair)
        used = pair >= 0
        return tl.maximum(expert, 0), tl.where(used, pair, 0), used & (expert >= 0)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_UNALIGNED)
def gate_up(
    addresses, x, hidden, sums, arrivals, ids, order, starts, blocks, squares, T, D, F, SPLITS,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    CHOICES: tl.constexpr, E: tl.constexpr, SORTED: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, SHRINK: tl.constexpr,
    SHARED: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """hidden [M, F] = SHRINK * silu(w1 x) * w3 x; grid (F / rows, groups, Z).

    Of several splits, the last one to arrive adds them up in order; `sums` holds two tiles of each
    block, `arrivals` its zero.
    x is [M / SHARED, D]: a row for each token or, where experts want inputs in orders of their own,
    for each pair. With `squares` [T, S] a token's row is multiplied by its `norm_factor`.
    """
    await_previous(DEPENDENT)
    PARTS: tl.constexpr = 4 // WARPS
    ROWS: tl.constexpr = WARPS * 16
    panel, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    expert, pair, used = columns_of(
        ids, order, starts, blocks, tl.program_id(1), T, CHOICES, E, COLUMNS, SORTED
    )
    if tl.sum(used.to(tl.int32), 0) == 0:
        return
    matrix = _matrix(addresses, expert, 0)
    split, tiles = tl.program_id(2), D // C
    gate, up = accumulate(
        matrix, x, pair // SHARED * D, panel, part,
        split * tiles // SPLITS, (split + 1) * tiles // SPLITS, D,
        KIND, C, GROUP, SYMMETRIC, WARPS, COLUMNS, STAGES,
    )  # fmt: skip
    if arrivals is not None:
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        count = tl.num_programs(0) * tl.num_programs(1)
        SIZE: tl.constexpr = ROWS * COLUMNS
        inside = tl.arange(0, COLUMNS)[None, :] * ROWS + tl.arange(0, ROWS)[:, None]
        place = sums + block * (2 * SIZE) + inside
        tl.store(place + split * count * (2 * SIZE), gate, mask=used[None, :])
        tl.store(place + split * count * (2 * SIZE) + SIZE, up, mask=used[None, :])
        if not is_last(arrivals + block, SPLITS):
            return
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for _ in range(SPLITS):
            gate += tl.load(place, mask=used[None, :], other=0.0, cache_modifier=".cg")
            up += tl.load(place + SIZE, mask=used[None, :], other=0.0, cache_modifier=".cg")
            place += count * (2 * SIZE)
    if squares is not None:
        factor = norm_factor(squares, pair // CHOICES, used, S, SLICES)[None, :]
        gate, up = gate * factor, up * factor
    decay = tl.exp(-tl.abs(gate))  # never overflows
    sigmoid = tl.where(gate >= 0, 1.0, decay) / (1.0 + decay)
    value = gate * sigmoid * up * SHRINK
    row = panel * BYTE_ROWS + part * ROWS + tl.arange(0, ROWS)
    at = hidden + pair[None, :] * F + row[:, None]
    tl.store(at, value.to(hidden.dtype.element_ty), mask=used[None, :])


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_UNALIGNED)
def down(
    addresses, offset, x, partials, ids, weights, order, starts, blocks, T, N, K, SPLITS,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    CHOICES: tl.constexpr, E: tl.constexpr, SORTED: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, GROW: tl.constexpr,
):  # fmt: skip
    """partials [Z, M, N] = GROW * weight * (matrix times x [M, K]); grid (2N / rows, groups, Z).

    Each split multiplies its part of the inputs; every element of `partials` is written once.
    """
    PARTS: tl.constexpr = 4 // WARPS
    panel, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    expert, pair, used = columns_of(
        ids, order, starts, blocks, tl.program_id(1), T, CHOICES, E, COLUMNS, SORTED
    )
    if tl.sum(used.to(tl.int32), 0) == 0:
        return
    store_weighted(
        addresses, offset, x, partials, ids, weights, T, N, K, SPLITS, expert, pair, used, panel, part,
        KIND, C, GROUP, SYMMETRIC, CHOICES, SORTED, WARPS, COLUMNS, STAGES, GROW,
    )  # fmt: skip


@triton.jit
def store_weighted(
    addresses, offset, x, partials, ids, weights, T, N, K, SPLITS, expert, pair, used, panel, part,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    CHOICES: tl.constexpr, SORTED: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, GROW: tl.constexpr,
):  # fmt: skip
    """This block's part of `down`, if it has pairs."""
    split = tl.program_id(2)
    matrix = _matrix(addresses, expert, offset)
    tiles = K // C
    low, high = accumulate(
        matrix, x, pair * K, panel, part, split * tiles // SPLITS, (split + 1) * tiles // SPLITS, K,
        KIND, C, GROUP, SYMMETRIC, WARPS, COLUMNS, STAGES,
    )  # fmt: skip
    partials += split.to(tl.int64) * (T * CHOICES) * N
    if SORTED:
        weight = tl.load(weights + pair, mask=used, other=0.0) * GROW
        _store(partials, low, high, weight, pair, used, panel, part, N, WARPS)
    else:
        at = tl.arange(0, COLUMNS) * CHOICES
        for choice in tl.static_range(CHOICES):
            chosen = tl.load(ids + at + choice, mask=used, other=-1).to(tl.int32)
            mine = used & (chosen == expert)
            weight = tl.load(weights + at + choice, mask=mine, other=0.0) * GROW
            _store(partials, low, high, weight, at + choice, mine, panel, part, N, WARPS)


@triton.jit
def prefetch_product(
    matrix, K, SPLITS,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Ask the second-level cache for what this block's part of `packed_matmul` will read."""
    PARTS: tl.constexpr = 4 // WARPS
    CODES: tl.constexpr = BYTE_ROWS * C * bits_of(KIND) // 4
    SCALES: tl.constexpr = BYTE_ROWS * 4 * (C // GROUP)
    TILE: tl.constexpr = CODES + (SCALES if SYMMETRIC else 2 * SCALES)
    panel, part, split = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(2)
    tiles = K // C
    first, last = split * tiles // SPLITS, (split + 1) * tiles // SPLITS
    source = matrix + HEADER + (panel.to(tl.int64) * tiles + first) * TILE
    prefetch(source, part, (last - first) * TILE, PARTS, 32 * WARPS)


@triton.jit
def store_product(
    matrix, x, partials, T, N, K, SPLITS,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This block's part of `packed_matmul`. Returns its panel, part, tokens, and which count."""
    PARTS: tl.constexpr = 4 // WARPS
    panel, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    split = tl.program_id(2)
    token = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = token < T
    tiles = K // C
    low, high = accumulate(
        matrix, x, tl.minimum(token, T - 1) * K, panel, part,
        split * tiles // SPLITS, (split + 1) * tiles // SPLITS, K,
        KIND, C, GROUP, SYMMETRIC, WARPS, COLUMNS, STAGES,
    )  # fmt: skip
    partials += split.to(tl.int64) * T * N
    _store(partials, low, high, used.to(tl.float32), token, used, panel, part, N, WARPS)
    return panel, part, token, used


@triton.jit(do_not_specialize=_COUNTS)
def packed_matmul(
    matrix, x, partials, T, N, K, SPLITS,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials [Z, T, N] = one matrix times x [T, K]; grid (2N / rows, T / COLUMNS, Z)."""
    store_product(
        matrix, x, partials, T, N, K, SPLITS, KIND, C, GROUP, SYMMETRIC, WARPS, COLUMNS, STAGES
    )


@triton.jit
def _store(partials, low, high, weight, pair, used, panel, part, N, WARPS: tl.constexpr):
    ROWS: tl.constexpr = WARPS * 16
    row = panel * (2 * BYTE_ROWS) + part * ROWS + tl.arange(0, ROWS)
    at = partials + pair[None, :] * N + row[:, None]
    tl.store(at, low * weight[None, :], mask=used[None, :])
    tl.store(at + BYTE_ROWS, high * weight[None, :], mask=used[None, :])


@triton.jit
def norm_factor(squares, token, used, S: tl.constexpr, SLICES: tl.constexpr):
    """1 / sqrt of the sum of a token's S shares of its mean square; SLICES >= S is a power of 2."""
    at = tl.arange(0, SLICES)
    shares = tl.load(
        squares + token[:, None] * S + at[None, :],
        mask=used[:, None] & (at < S)[None, :],
        other=0.0,
        cache_modifier=".cg",
    )
    return tl.rsqrt(tl.where(used, tl.sum(shares, 1), 1.0))


@triton.jit
def summed(partials, token, M, N, at, inside, SPLITS: tl.constexpr, CHOICES: tl.constexpr):
    """Columns `at` of a token's output, float32: its choices and splits added in that order.

    Read past the first-level cache: other blocks of the same launch may have stored them.
    """
    total = tl.zeros(at.shape, tl.float32)
    for choice in tl.static_range(CHOICES):
        for split in tl.static_range(SPLITS):
            row = (token * CHOICES + choice).to(tl.int64) + split * M
            share = tl.load(partials + row * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            total += share.to(tl.float32)
    return total


@triton.jit(do_not_specialize=["M"])
def combine(partials, out, M, N, SPLITS: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, N] = partials [Z, M, N] summed over a token's choices and splits, in that order."""
    token = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = summed(partials, token, M, N, at, at < N, SPLITS, CHOICES)
    tl.store(out + token * N + at, total.to(out.dtype.element_ty), mask=at < N)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_UNALIGNED)
def dequantize(
    addresses, expert, offset, out, K, SECOND,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """out [N, K] = the matrix; grid (N / 128, K / C).

    A row of the high plane lies SECOND rows behind that of the low one: F of w1 and w3, else 64.
    """
    CODES: tl.constexpr = BYTE_ROWS * C * bits_of(KIND) // 4
    SCALES: tl.constexpr = BYTE_ROWS * 4 * (C // GROUP)
    TILE: tl.constexpr = CODES + (SCALES if SYMMETRIC else 2 * SCALES)
    panel, tile = tl.program_id(0), tl.program_id(1)
    matrix = _matrix(addresses, expert, offset)
    source = matrix + HEADER + (panel.to(tl.int64) * (K // C) + tile) * TILE
    WIDTH: tl.constexpr = block_inputs(KIND, C)
    SPAN: tl.constexpr = GROUP if GROUP < WIDTH else WIDTH
    rows, inputs = tl.arange(0, BYTE_ROWS), tl.arange(0, WIDTH)
    places, pairs = codes_at(0, 4, WIDTH // 32), pair_places(rows, WIDTH, SPAN)
    words = tile_words(source, places, KIND, C)
    values = decode(words, decoding_words(matrix, KIND), KIND)
    factors = matrix.to(tl.pointer_type(tl.float32))
    for block in tl.static_range(C // WIDTH):
        here = pairs + BYTE_ROWS * (block * WIDTH // GROUP)
        low = operand(values[2 * block], 4, WIDTH // 32)
        high = operand(values[2 * block + 1], 4, WIDTH // 32)
        if not SYMMETRIC:
            low_zero, high_zero = both_planes(tl.load(plane_pairs(source + CODES + SCALES, here)))
            low += of_inputs(low_zero, WIDTH, SPAN)
            high += of_inputs(high_zero, WIDTH, SPAN)
        low_scale, high_scale = both_planes(tl.load(plane_pairs(source + CODES, here)))
        low_scale = low_scale.to(tl.float32) * tl.load(factors)
        high_scale = high_scale.to(tl.float32) * tl.load(factors + 1)
        low = low.to(tl.float32) * of_inputs(low_scale, WIDTH, SPAN)
        high = high.to(tl.float32) * of_inputs(high_scale, WIDTH, SPAN)
        # Computed before the loads, addresses would be held meanwhile: Int4 took 128 registers on
        # sm_80 (Triton 3.7), in place of 80.
        panel_rows = tl.where(SECOND == BYTE_ROWS, 2 * BYTE_ROWS, BYTE_ROWS)
        row = (panel * panel_rows + rows).to(tl.int64)
        at = out + row[:, None] * K + (tile * C + block * WIDTH + inputs)[None, :]
        tl.store(at, low.to(out.dtype.element_ty))
        tl.store(at + SECOND.to(tl.int64) * K, high.to(out.dtype.element_ty))
