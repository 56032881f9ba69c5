# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""The Triton kernels of attention. Only kernels.gpu.attention starts them.

Keys and values are a ring of R slots: column c of a row lies in slot c mod R. A cache that never
rolls is a ring that is never full; a plain tensor is a ring that is exactly full. Thread blocks
walk columns, not slots, and only the columns that one of their queries may see. Other slots are not
read, and a rolled cache gives the same bits as a straight one.

The query heads of a key-value head are rows of one tile, so each key is read once for all of them.
The softmax is float32 and computed on the way (FlashAttention, arXiv 2205.14135): a row keeps the
largest score so far, the sum of exponentials and the weighted sum of values.

Shape letters: see qmix.kernels.
"""

import triton
import triton.language as tl

from qmix.kernels.gpu.arrivals_triton import is_last
from qmix.kernels.gpu.dependent_triton import await_previous

_LOG2_E = tl.constexpr(1.4426950408889634)
# These change from step to step: 1 and multiples of 16 get no compilation of their own.
_LENGTHS = ["columns", "queries", "window", "R", "mask_batch", "SPLITS"]


@triton.jit
def _walk(
    q, at, keys, values, padding_mask, lowest, first, last, end, window, R, k_row, v_row,
    D: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attend to tiles [first, last) of the columns from `lowest` to `end`.

    The queries q [rows, d] stand at columns `at`. Returns the weighted sum of values [rows, d], the
    largest score [rows] and the sum of exponentials [rows]; scores are exponents of 2.
    """
    dim = tl.arange(0, D)
    summed = tl.zeros([q.shape[0], D], tl.float32)
    largest = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    scale = _LOG2_E / tl.sqrt(D * 1.0)
    for tile in tl.range(first, last, num_stages=STAGES):
        start = lowest + tile * COLUMNS
        column = start + tl.arange(0, COLUMNS)
        valid = column < end
        slot = start % R + tl.arange(0, COLUMNS)
        slot = tl.where(slot >= R, slot - R, slot)  # no more than R columns are walked
        key = tl.load(keys + slot[None, :] * k_row + dim[:, None], mask=valid[None, :], other=0.0)
        scores = tl.dot(q, key, input_precision="ieee") * scale
        seen = valid[None, :] & (column[None, :] <= at[:, None])
        seen = seen & (column[None, :] > at[:, None] - window)
        if padding_mask is not None:
            # Only scores are masked: loads that depend on a load could not run ahead.
            seen = seen & (tl.load(padding_mask + column, mask=valid, other=0) != 0)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # the row has seen no column yet
        weight = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(
            values + slot[:, None] * v_row + dim[None, :], mask=valid[:, None], other=0.0
        )
        summed = summed * shrink[:, None]
        summed += tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        largest = higher
    return summed, largest, total


@triton.jit
def _merge_head(sums, peaks, totals, out, head, SPLITS, PARTS: tl.constexpr, D: tl.constexpr):
    """out[head] = its splits as one softmax."""
    part, dim = tl.arange(0, PARTS), tl.arange(0, D)
    place = head * SPLITS + part
    some = part < SPLITS
    total = tl.load(totals + place, mask=some, other=0.0, cache_modifier=".cg")
    peak = tl.load(peaks + place, mask=some, other=float("-inf"), cache_modifier=".cg")
    highest = tl.max(peak, 0)
    factor = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    part_sums = tl.load(
        sums + place[:, None] * D + dim[None, :],
        mask=(total > 0)[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    summed = tl.sum(part_sums * factor[:, None], 0)
    whole = tl.sum(total * factor, 0)
    result = summed / tl.where(whole == 0, 1.0, whole)  # no visible column: zeros
    tl.store(out + head * D + dim, result.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=_LENGTHS)
def split(
    q, keys, values, padding_mask, past, starts, sums, peaks, totals, out, arrivals,
    columns, window, R, SPLITS,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch,
    GROUP_HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One query a row, one split of the columns: sums [B, H, Z, d], peaks and totals [B, H, Z].

    Grid (G, Z, B). The new column is the last of `columns`, or column past[b] where `past` is
    given. With `arrivals`, zeros [B, G], the last split does what `merge` does; PARTS >= Z.
    """
    await_previous(DEPENDENT)
    shared, part, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = columns
    if past is not None:
        end = tl.load(past + batch) + 1
    lowest = tl.maximum(end - window, 0)
    if starts is not None:
        lowest = tl.maximum(lowest, tl.load(starts + batch))
    if padding_mask is not None:
        padding_mask += batch.to(tl.int64) * mask_batch
    tiles = tl.cdiv(tl.maximum(end - lowest, 0), COLUMNS)
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    head = shared * GROUP_HEADS + row
    used = row < GROUP_HEADS
    query = tl.load(
        q + batch.to(tl.int64) * q_batch + head[:, None] * q_head + dim[None, :],
        mask=used[:, None],
        other=0.0,
    )
    summed, largest, total = _walk(
        query, row * 0 + end - 1,
        keys + batch.to(tl.int64) * k_batch + shared.to(tl.int64) * k_head,
        values + batch.to(tl.int64) * v_batch + shared.to(tl.int64) * v_head,
        padding_mask, lowest, part * tiles // SPLITS, (part + 1) * tiles // SPLITS, end, window, R,
        k_row, v_row, D, COLUMNS, STAGES,
    )  # fmt: skip
    place = (batch * tl.num_programs(0) * GROUP_HEADS + head) * SPLITS + part
    tl.store(peaks + place, largest, mask=used)
    tl.store(totals + place, total, mask=used)
    # A split without a visible column is neither stored nor read by `merge`.
    tl.store(sums + place[:, None] * D + dim[None, :], summed, mask=(used & (total > 0))[:, None])
    if arrivals is not None:  # noqa: SIM102  one is known to the compiler, one is not
        if is_last(arrivals + batch * tl.num_programs(0) + shared, SPLITS):
            first = (batch * tl.num_programs(0) + shared) * GROUP_HEADS
            for member in tl.static_range(GROUP_HEADS):
                _merge_head(sums, peaks, totals, out, first + member, SPLITS, PARTS, D)


@triton.jit(do_not_specialize=_LENGTHS)
def merge(sums, peaks, totals, out, SPLITS, PARTS: tl.constexpr, D: tl.constexpr):
    """out [B, H, d] = the splits as one softmax; grid (B * H). PARTS >= Z is a power of 2."""
    _merge_head(sums, peaks, totals, out, tl.program_id(0), SPLITS, PARTS, D)


@triton.jit(do_not_specialize=_LENGTHS)
def prefill(
    q, keys, values, padding_mask, past, starts, out, columns, queries, window, R,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch,
    GROUP_HEADS: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out [B, S, H, d]; grid (S / QUERIES, H, B).

    The queries are the last S of `columns`, or start at column past[b] where `past` is given.
    """
    # Blocks that see the most columns start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    before = columns - queries
    if past is not None:
        before = tl.load(past + batch)
    row, dim = block * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D)
    used = row < queries
    end = before + tl.minimum((block + 1) * QUERIES, queries)
    lowest = tl.maximum(before + block * QUERIES + 1 - window, 0)
    if starts is not None:
        lowest = tl.maximum(lowest, tl.load(starts + batch))
    if padding_mask is not None:
        padding_mask += batch.to(tl.int64) * mask_batch
    query = tl.load(
        q + batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
        + row[:, None] * q_row + dim[None, :],
        mask=used[:, None], other=0.0,
    )  # fmt: skip
    shared = (head // GROUP_HEADS).to(tl.int64)
    summed, _, total = _walk(
        query, before + row,
        keys + batch.to(tl.int64) * k_batch + shared * k_head,
        values + batch.to(tl.int64) * v_batch + shared * v_head,
        padding_mask, lowest, 0, tl.cdiv(tl.maximum(end - lowest, 0), COLUMNS), end, window, R,
        k_row, v_row, D, COLUMNS, STAGES,
    )  # fmt: skip
    result = summed / tl.where(total == 0, 1.0, total)[:, None]  # no visible column: zeros
    place = (batch.to(tl.int64) * queries + row[:, None]) * tl.num_programs(1) + head
    tl.store(out + place * D + dim[None, :], result.to(out.dtype.element_ty), mask=used[:, None])
