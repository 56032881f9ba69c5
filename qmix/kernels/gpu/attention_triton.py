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

Keys and values may be rows of codes (qmix.kernels.kv_rows): `steps` are the same memory as float32,
and absent otherwise. Codes are whole numbers in any dtype; a key's step multiplies its scores, a
value's step its weights.

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
def _step_of(D: tl.constexpr, slot):
    """Where the step of a slot lies, in float32: behind d codes."""
    return slot * (D // 4 + 1) + D // 4


@triton.jit
def _place_of(slot, row, D: tl.constexpr, CODES: tl.constexpr):
    """Where the elements of a slot begin. A row of codes has a known size: loads of 32 bits."""
    if CODES:
        return slot * (D + 4)
    return slot * row


@triton.jit
def _store_codes(new, rows, steps, slot, D: tl.constexpr):
    """The numbers new [d] as the row of codes of a slot: what kv_rows.quantized gives."""
    dim = tl.arange(0, D)
    number = tl.load(new + dim, cache_modifier=".cg").to(tl.float32)
    # The largest as bits without a sign: NaN is larger than infinity.
    bits = number.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    step = tl.div_rn(tl.max(bits, 0).to(tl.float32, bitcast=True), 127.0)
    step = tl.where(step < 1.1754943508222875e-38, 1.1754943508222875e-38, step)
    scaled = number * tl.div_rn(1.0, step)
    code = (scaled + 12582912.0) - 12582912.0  # rounds to even, below 2^22
    code = tl.where(code == code, code, 0.0).to(tl.int8)
    tl.store(rows + slot * (D + 4) + dim, code)
    tl.store(steps + _step_of(D, slot), step)


@triton.jit
def _walk(
    q, at, keys, values, key_steps, value_steps, padding_mask, lowest, first, last, end, window, R,
    k_row, v_row, D: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
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
    CODES: tl.constexpr = key_steps is not None
    for tile in tl.range(first, last, num_stages=STAGES):
        start = lowest + tile * COLUMNS
        column = start + tl.arange(0, COLUMNS)
        valid = column < end
        slot = start % R + tl.arange(0, COLUMNS)
        slot = tl.where(slot >= R, slot - R, slot)  # no more than R columns are walked
        key = tl.load(
            keys + _place_of(slot, k_row, D, CODES)[None, :] + dim[:, None],
            mask=valid[None, :],
            other=0,
        )
        scores = tl.dot(q, key.to(q.dtype), input_precision="ieee") * scale
        if CODES:
            steps = tl.load(key_steps + _step_of(D, slot), mask=valid, other=0.0)
            scores = scores * steps[None, :]
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
            values + _place_of(slot, v_row, D, CODES)[:, None] + dim[None, :],
            mask=valid[:, None],
            other=0,
        )
        if CODES:
            steps = tl.load(value_steps + _step_of(D, slot), mask=valid, other=0.0)
            weight = weight * steps[None, :]
        summed = summed * shrink[:, None]
        summed += tl.dot(weight.to(q.dtype), value.to(q.dtype), input_precision="ieee")
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
    q, keys, values, key_steps, value_steps, new_keys, new_values, padding_mask, past, starts,
    sums, peaks, totals, out, arrivals, columns, window, R, SPLITS,
    q_batch, q_head, k_batch, k_head, k_row, v_batch, v_head, v_row, mask_batch,
    GROUP_HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One query a row, one split of the columns: sums [B, H, Z, d], peaks and totals [B, H, Z].

    Grid (G, Z, B). The new column is the last of `columns`, or column past[b] where `past` is
    given. With `arrivals`, zeros [B, G], the last split does what `merge` does; PARTS >= Z. With
    new_keys and new_values [B, G, d], the last split stores them as codes of the new column first.
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
    k_place = batch.to(tl.int64) * k_batch + shared.to(tl.int64) * k_head
    v_place = batch.to(tl.int64) * v_batch + shared.to(tl.int64) * v_head
    keys, values = keys + k_place, values + v_place
    if key_steps is not None:
        key_steps, value_steps = key_steps + k_place // 4, value_steps + v_place // 4
        keys, values = tl.multiple_of(keys, 4), tl.multiple_of(values, 4)
    if new_keys is not None:  # noqa: SIM102  one is known to the compiler, one is not
        if part == SPLITS - 1:  # no other split sees the new column
            new, slot = (batch * tl.num_programs(0) + shared) * D, (end - 1) % R
            _store_codes(new_keys + new, keys, key_steps, slot, D)
            _store_codes(new_values + new, values, value_steps, slot, D)
            tl.debug_barrier()
    summed, largest, total = _walk(
        query, row * 0 + end - 1, keys, values, key_steps, value_steps, padding_mask,
        lowest, part * tiles // SPLITS, (part + 1) * tiles // SPLITS, end, window, R,
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
    q, keys, values, key_steps, value_steps, padding_mask, past, starts, out,
    columns, queries, window, R,
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
    k_place = batch.to(tl.int64) * k_batch + shared * k_head
    v_place = batch.to(tl.int64) * v_batch + shared * v_head
    keys, values = keys + k_place, values + v_place
    if key_steps is not None:
        key_steps, value_steps = key_steps + k_place // 4, value_steps + v_place // 4
        keys, values = tl.multiple_of(keys, 4), tl.multiple_of(values, 4)
    summed, _, total = _walk(
        query, before + row, keys, values, key_steps, value_steps, padding_mask,
        lowest, 0, tl.cdiv(tl.maximum(end - lowest, 0), COLUMNS), end, window, R,
        k_row, v_row, D, COLUMNS, STAGES,
    )  # fmt: skip
    result = summed / tl.where(total == 0, 1.0, total)[:, None]  # no visible column: zeros
    place = (batch.to(tl.int64) * queries + row[:, None]) * tl.num_programs(1) + head
    tl.store(out + place * D + dim[None, :], result.to(out.dtype.element_ty), mask=used[:, None])
