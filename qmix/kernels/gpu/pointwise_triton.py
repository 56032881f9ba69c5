# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201
"""The Triton kernels between the matmuls of a layer. Only kernels.gpu.pointwise starts them.

A matmul leaves partial sums, float32 [Z, M, N], a row for each pair of token and expert. The next
kernel adds them up while reading, choice by choice and split by split as `combine` does, and rounds
to the model's dtype where the reference rounds.

Shape letters: see qmix.kernels.
"""

import triton
import triton.language as tl

from qmix.kernels.gpu.moe_triton import summed

# These change from step to step: 1 and multiples of 16 get no compilation of their own.
_LENGTHS = ["M", "T", "rows", "queries", "positions", "R", "cos_batch"]


@triton.jit
def choose(
    logits, used, ids, weights, token,
    E: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """Store ids and softmax of the CHOSEN largest of E logits, equal ones in order.

    logits [tokens, EXPERTS] float32; token and used [tokens].
    """
    # A softmax over all E, renormalised to the chosen ones, is the softmax over the chosen ones.
    expert = tl.arange(0, logits.shape[1])[None, :]
    unchosen = used[:, None] & (expert < E)
    exp_sum = tl.zeros([logits.shape[0]], tl.float32)
    highest = tl.max(tl.where(expert < E, logits, float("-inf")), 1)
    chosen_exp = tl.zeros(logits.shape, tl.float32)
    for choice in tl.static_range(CHOSEN):
        best = tl.max(tl.where(unchosen, logits, float("-inf")), 1)
        # NaN logits choose the last expert: an id always names an expert.
        ties = unchosen & (logits == best[:, None])
        best_expert = tl.minimum(tl.min(tl.where(ties, expert, E), 1), E - 1)
        is_best = expert == best_expert[:, None]
        value = tl.sum(tl.where(is_best, tl.exp(logits - highest[:, None]), 0.0), 1)
        chosen_exp = tl.where(expert == choice, value[:, None], chosen_exp)
        exp_sum += value
        unchosen = unchosen & ~is_best
        tl.store(ids + token * CHOSEN + choice, best_expert.to(tl.int64), mask=used)
    tl.store(
        weights + token[:, None] * CHOSEN + expert,
        chosen_exp / exp_sum[:, None],
        mask=used[:, None] & (expert < CHOSEN),
    )


@triton.jit(do_not_specialize=_LENGTHS)
def residual_norm(
    x, partials, weight, total, normed, gate, logits, ids, weights, M, D, eps,
    SPLITS: tl.constexpr, CHOICES: tl.constexpr, E: tl.constexpr, CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """total [T, D] = x + the sum of partials; normed = its RMSNorm; then the router; grid (T).

    Without `partials`, total is x and not stored; without `gate` there is no router. BLOCK >= D and
    EXPERTS >= E are powers of 2.
    """
    token = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < D
    row = token.to(tl.int64) * D + at
    residual = tl.load(x + row, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype.element_ty
    if partials is not None:
        added = summed(partials, token, M, D, at, inside, SPLITS, CHOICES).to(dtype)
        residual = (residual.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total + row, residual, mask=inside)
    value = residual.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    value = (factor * (value * scale).to(dtype).to(tl.float32)).to(dtype)
    tl.store(normed + row, value.to(normed.dtype.element_ty), mask=inside)
    if gate is not None:
        value = value.to(tl.float32)
        expert = tl.arange(0, EXPERTS)
        rows = tl.load(
            gate + expert[:, None] * D + at[None, :],
            mask=(expert < E)[:, None] & inside[None, :],
            other=0.0,
        )
        score = tl.sum(rows.to(tl.float32) * value[None, :], 1)  # one reduction for all experts
        rounded = score.to(dtype)
        tl.store(logits + token * E + expert, rounded, mask=expert < E)
        one = tl.arange(0, 1)
        choose(rounded.to(tl.float32)[None, :], one == 0, ids, weights, token + one, E, CHOSEN)


@triton.jit
def route(logits, ids, weights, E: tl.constexpr, CHOSEN: tl.constexpr, EXPERTS: tl.constexpr):
    """ids and weights [T, k] of logits [T, E]; grid (T)."""
    token, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    score = tl.load(logits + token * E + expert, mask=expert < E, other=0.0).to(tl.float32)
    one = tl.arange(0, 1)
    choose(score[None, :], one == 0, ids, weights, token + one, E, CHOSEN)


@triton.jit(do_not_specialize=_LENGTHS)
def rotate(
    x, out, cos, sin, rows, queries, x_batch, x_head, x_row, cos_batch,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """out [B, H, S, d] = x rotated by cos and sin [B or 1, S, d]; grid (B * S / ROWS, H)."""
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    used = (row < rows)[:, None]
    batch, query = (row // queries).to(tl.int64)[:, None], (row % queries)[:, None]
    dim = tl.arange(0, D // 2)[None, :]
    source = x + batch * x_batch + head.to(tl.int64) * x_head + query * x_row + dim
    angle = batch * cos_batch + query * D + dim
    low = tl.load(source, mask=used, other=0.0).to(tl.float32)
    high = tl.load(source + D // 2, mask=used, other=0.0).to(tl.float32)
    low_cos = tl.load(cos + angle, mask=used, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + angle, mask=used, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + angle + D // 2, mask=used, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + angle + D // 2, mask=used, other=0.0).to(tl.float32)
    place = out + ((batch * tl.num_programs(1) + head) * queries + query) * D + dim
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(place, (low * low_cos - high * low_sin).to(dtype), mask=used)
    tl.store(place + D // 2, (high * high_cos + low * high_sin).to(dtype), mask=used)


@triton.jit
def place_head(
    low, high, head, row, used, dim, q, keys, values, cos, sin, past, starts, queries, positions, R,
    k_batch, k_head, k_row, v_batch, v_head, v_row, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rotate a head's elements `dim` [1, n] and `dim` + d / 2 of some tokens, and store them.

    low, high [tokens, n] in the dtype of q; row and used [tokens].
    """
    batch, query = row // queries, row % queries
    column = tl.load(past + batch, mask=used, other=0) + query
    position = column
    if starts is not None:
        position = tl.maximum(column - tl.load(starts + batch, mask=used, other=0), 0)
    inside = used[:, None] & (dim >= 0)
    dtype: tl.constexpr = q.dtype.element_ty
    if head < H + G:
        # A position beyond the table gives NaN.
        in_table = inside & (position < positions)[:, None]
        angle = position[:, None] * D + dim
        c = tl.load(cos + angle, mask=in_table, other=float("nan")).to(tl.float32)
        s = tl.load(sin + angle, mask=in_table, other=float("nan")).to(tl.float32)
        unrotated = low.to(tl.float32)
        low = (unrotated * c - high.to(tl.float32) * s).to(dtype)
        high = (high.to(tl.float32) * c + unrotated * s).to(dtype)
    if head < H:
        place = q + (row.to(tl.int64)[:, None] * H + head) * D + dim
        tl.store(place, low, mask=inside)
        tl.store(place + D // 2, high, mask=inside)
    else:
        stored = inside & (query >= queries - R)[:, None]
        slot = (column % R)[:, None]
        batch64 = batch.to(tl.int64)[:, None]
        if head < H + G:
            place = keys + batch64 * k_batch + (head - H).to(tl.int64) * k_head + slot * k_row + dim
            tl.store(place, low.to(keys.dtype.element_ty), mask=stored)
            tl.store(place + D // 2, high.to(keys.dtype.element_ty), mask=stored)
        else:
            place = (
                values
                + batch64 * v_batch
                + (head - H - G).to(tl.int64) * v_head
                + slot * v_row
                + dim
            )
            tl.store(place, low.to(values.dtype.element_ty), mask=stored)
            tl.store(place + D // 2, high.to(values.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=_LENGTHS)
def rotate_store(
    partials, q, keys, values, cos, sin, past, starts, T, queries, positions, R,
    k_batch, k_head, k_row, v_batch, v_head, v_row,
    SPLITS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One head of ROWS tokens, rotated into q [T, H, d] or into its slot; grid (T / ROWS, H + 2 G).

    The heads of partials [Z, T, (H + 2 G) d] are queries, keys, values. cos and sin [positions, d]
    are equal in both halves. Of more tokens than slots the last R are stored.
    """
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    used = row < T
    dim = tl.arange(0, D // 2)[None, :]
    at = head * D + dim + row[:, None] * 0
    width = (H + 2 * G) * D
    inside = used[:, None] & (dim >= 0)
    dtype: tl.constexpr = q.dtype.element_ty
    # Rounded as the output of a matmul would be.
    low = summed(partials, row[:, None], T, width, at, inside, SPLITS, 1).to(dtype)
    high = summed(partials, row[:, None], T, width, at + D // 2, inside, SPLITS, 1).to(dtype)
    place_head(
        low, high, head, row, used, dim, q, keys, values, cos, sin, past, starts, queries, positions, R,
        k_batch, k_head, k_row, v_batch, v_head, v_row, H, G, D,
    )  # fmt: skip
