# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""Products whose last block does what would be the next launch. Only kernels.gpu.fused starts them.

The blocks that share a panel of rows store partial sums, as they do without this; the one that
arrives last adds them up. An RMSNorm needs all panels, so it is left to the next product: each
panel stores x * w and its share of the mean square, and the next product multiplies its sums by
1 / sqrt of the mean (`norm_factor`), once a token.

x * w goes through float16, so it is scaled by a power of 2, which costs no bits: 2^-4 times the
largest one in 1 / rms of the norm before. An element may then be 2^20 times that rms before it
overflows, and the rms may fall to 2^-11 of the last one before float16 keeps fewer bits of it than
bfloat16 has.

Shape letters: see qmix.kernels.
"""

import triton
import triton.language as tl

from qmix.kernels.gpu.arrivals_triton import is_last
from qmix.kernels.gpu.dependent_triton import await_previous
from qmix.kernels.gpu.moe_triton import (
    BYTE_ROWS,
    columns_of,
    norm_factor,
    prefetch_product,
    store_product,
    store_weighted,
    summed,
)
from qmix.kernels.gpu.pointwise_triton import choose, place_head

# These change from step to step: 1 and multiples of 16 get no compilation of their own.
_COUNTS = ["T", "SPLITS", "positions", "R"]


@triton.jit
def _power_of_2(inverse_rms):
    """2^-4 times the largest power of 2 that is no more."""
    exponent = inverse_rms.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True) * 0.0625


@triton.jit
def start_norm(x, weight, weighted, squares, scale, D, eps, BLOCK: tl.constexpr):
    """A row of x [T, D] as `_add_norm` leaves it, its mean square in one share; grid (T)."""
    token, at = tl.program_id(0), tl.arange(0, BLOCK)
    inside = at < D
    value = tl.load(x + token.to(tl.int64) * D + at, mask=inside, other=0.0).to(tl.float32)
    power = _power_of_2(tl.rsqrt(tl.sum(value * value, 0) / D + eps))
    value = value * power
    tl.store(squares + token, tl.sum(value * value, 0) / D + eps * power * power)
    tl.store(scale + token, power)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(weighted + token.to(tl.int64) * D + at, (value * factor).to(tl.float16), mask=inside)


@triton.jit
def _add_half(
    partials, x, weight, total, weighted, token, inside, power, M, N, at,
    Z: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """One plane of a panel: stores the new residual and its product with w.

    Returns that product, and the scaled residual, float32 [tokens, rows].
    """
    row = token.to(tl.int64)[:, None] * N + at[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    added = summed(partials, token[:, None], M, N, at[None, :], inside, Z, CHOICES).to(dtype)
    residual = tl.load(x + row, mask=inside, other=0.0)
    residual = (residual.to(tl.float32) + added.to(tl.float32)).to(dtype)
    tl.store(total + row, residual, mask=inside)
    value = residual.to(tl.float32) * power[:, None]
    product = value * tl.load(weight + at).to(tl.float32)[None, :]
    tl.store(weighted + row, product.to(tl.float16), mask=inside)
    return product, value


@triton.jit
def _add_norm(
    partials, x, weight, total, weighted, squares, scale, last_squares, last_scale, token, used,
    panel, part, M, N, eps,
    Z: tl.constexpr, CHOICES: tl.constexpr, WARPS: tl.constexpr, S: tl.constexpr,
    LAST_S: tl.constexpr, LAST_SLICES: tl.constexpr,
):  # fmt: skip
    """Add a panel's partial sums to x, and store its part of the norm.

    Returns the products with w, low and high plane, float32 [tokens, rows], and where these lie.
    """
    ROWS: tl.constexpr = WARPS * 16
    at = panel * (2 * BYTE_ROWS) + part * ROWS + tl.arange(0, ROWS)
    inside = used[:, None] & (at >= 0)[None, :]
    last = tl.load(last_scale + token, mask=used, other=1.0, cache_modifier=".cg")
    power = _power_of_2(norm_factor(last_squares, token, used, LAST_S, LAST_SLICES) * last)
    low, low_value = _add_half(
        partials, x, weight, total, weighted, token, inside, power, M, N, at, Z, CHOICES
    )
    high, high_value = _add_half(
        partials, x, weight, total, weighted, token, inside, power, M, N, at + BYTE_ROWS, Z, CHOICES
    )
    square = tl.sum(low_value * low_value, 1) + tl.sum(high_value * high_value, 1)
    slice_ = tl.program_id(0)
    share = (square + eps * power * power * (2 * ROWS)) / N
    tl.store(squares + token * S + slice_, share, mask=used)
    tl.store(scale + token, power, mask=used & (slice_ == 0))
    return low, high, at


@triton.jit(do_not_specialize=_COUNTS)
def matmul_rotate_store(
    matrix, x, partials, T, N, K, SPLITS,
    squares, arrivals, q, keys, values, cos, sin, past, starts, positions, R,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    Z: tl.constexpr, H: tl.constexpr, G: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr,
    DEPENDENT: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """`packed_matmul` of q, k and v, then `rotate_store`: a panel is a head of width 128."""
    if PREFETCH:
        prefetch_product(matrix, K, SPLITS, KIND, C, GROUP, SYMMETRIC, WARPS)
    await_previous(DEPENDENT)
    panel, part, token, used = store_product(
        matrix, x, partials, T, N, K, SPLITS, KIND, C, GROUP, SYMMETRIC, WARPS, COLUMNS, STAGES
    )
    ROWS: tl.constexpr = WARPS * 16
    if is_last(arrivals + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), SPLITS):
        dim = part * ROWS + tl.arange(0, ROWS)[None, :]
        at = panel * (2 * BYTE_ROWS) + dim
        inside = used[:, None] & (dim >= 0)
        low = summed(partials, token[:, None], T, N, at, inside, Z, 1)
        high = summed(partials, token[:, None], T, N, at + BYTE_ROWS, inside, Z, 1)
        if squares is not None:
            factor = norm_factor(squares, token, used, S, SLICES)[:, None]
            low, high = low * factor, high * factor
        dtype: tl.constexpr = q.dtype.element_ty
        place_head(
            low.to(dtype), high.to(dtype), panel, token, used, dim,
            q, keys, values, cos, sin, past, starts, 1, positions, R,
            k_batch, k_head, k_row, v_batch, v_head, v_row, H, G, 2 * BYTE_ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def matmul_add_route(
    matrix, x, partials, T, N, K, SPLITS,
    arrivals, residual, weight, total, weighted, squares, scale, last_squares, last_scale,
    gate, shares, ids, weights, eps,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    Z: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr,
    S: tl.constexpr, SLICES: tl.constexpr, LAST_S: tl.constexpr, LAST_SLICES: tl.constexpr,
    DEPENDENT: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """`packed_matmul` of o_proj, then the sum, the norm's shares, and the router.

    Each panel stores its share of the logits, shares [T, S, EXPERTS]; the last panel chooses. The
    norm that the router sees is not rounded. `arrivals` has a counter more than there are panels.
    """
    if PREFETCH:
        prefetch_product(matrix, K, SPLITS, KIND, C, GROUP, SYMMETRIC, WARPS)
    await_previous(DEPENDENT)
    panel, part, token, used = store_product(
        matrix, x, partials, T, N, K, SPLITS, KIND, C, GROUP, SYMMETRIC, WARPS, COLUMNS, STAGES
    )
    if is_last(arrivals + tl.program_id(0), SPLITS):
        low, high, at = _add_norm(
            partials, residual, weight, total, weighted, squares, scale, last_squares, last_scale,
            token, used, panel, part, T, N, eps, Z, 1, WARPS, S, LAST_S, LAST_SLICES,
        )  # fmt: skip
        for expert in tl.static_range(E):
            row = gate + expert * N + at
            score = tl.sum(low * tl.load(row).to(tl.float32)[None, :], 1)
            score += tl.sum(high * tl.load(row + BYTE_ROWS).to(tl.float32)[None, :], 1)
            place = (token * S + tl.program_id(0)) * EXPERTS + expert
            tl.store(shares + place, score, mask=used)
        if is_last(arrivals + tl.num_programs(0), tl.num_programs(0)):
            # A few shares at a time: all at once are 256 registers of a thread of one warp.
            SOME: tl.constexpr = min(SLICES, 8)
            every = tl.arange(0, EXPERTS)[None, None, :]
            scores = tl.zeros([COLUMNS, SOME, EXPERTS], tl.float32)
            for first in tl.static_range(0, SLICES, SOME):
                slice_ = first + tl.arange(0, SOME)[None, :, None]
                scores += tl.load(
                    shares + (token[:, None, None] * S + slice_) * EXPERTS + every,
                    mask=used[:, None, None] & (slice_ < S) & (every < E),
                    other=0.0,
                    cache_modifier=".cg",
                )
            logits = tl.sum(scores, 1) * norm_factor(squares, token, used, S, SLICES)[:, None]
            rounded = logits.to(residual.dtype.element_ty).to(tl.float32)
            choose(rounded, used, ids, weights, token, E, CHOSEN)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=["addresses"])
def down_add(
    addresses, offset, x, partials, ids, weights, order, starts, blocks, T, N, K, SPLITS,
    arrivals, residual, weight, total, weighted, squares, scale, last_squares, last_scale, eps,
    KIND: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr,
    CHOICES: tl.constexpr, E: tl.constexpr, SORTED: tl.constexpr,
    WARPS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, GROW: tl.constexpr,
    Z: tl.constexpr, S: tl.constexpr, LAST_S: tl.constexpr, LAST_SLICES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`down`, then the sum over experts and the shares of the next norm. Not for sorted pairs."""
    await_previous(DEPENDENT)
    PARTS: tl.constexpr = 4 // WARPS
    panel, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    expert, pair, mine = columns_of(
        ids, order, starts, blocks, tl.program_id(1), T, CHOICES, E, COLUMNS, SORTED
    )
    if tl.sum(mine.to(tl.int32), 0) > 0:
        store_weighted(
            addresses, offset, x, partials, ids, weights, T, N, K, SPLITS, expert, pair, mine, panel, part,
            KIND, C, GROUP, SYMMETRIC, CHOICES, SORTED, WARPS, COLUMNS, STAGES, GROW,
        )  # fmt: skip
    if is_last(arrivals + tl.program_id(0), tl.num_programs(1) * tl.num_programs(2)):
        token = tl.arange(0, COLUMNS)
        _add_norm(
            partials, residual, weight, total, weighted, squares, scale, last_squares, last_scale,
            token, token < T, panel, part, T * CHOICES, N, eps,
            Z, CHOICES, WARPS, S, LAST_S, LAST_SLICES,
        )  # fmt: skip
