# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201
"""The Triton kernels that round a group of inputs. Only rounding.gptq_kernels starts them.

A program owns some columns of one matrix: outputs, or pairs of an output and a trial. It walks the
inputs one by one and keeps what the earlier ones left in registers. Each step needs only one sum
over the inputs, `sum_j F[k, j] state[j]`, and the other entries of `state` do not move. So no row
has to be picked out of the registers, and every factor is read once.

In memory a group is rows k of [B, K, N], with `matrix_stride` = K N. Shape letters: B matrices, N
outputs, g inputs of a group (SIZE), R trials.
"""

import triton
import triton.language as tl

_LENGTHS = ["N", "candidates"]


@triton.jit
def nearest(value):
    """Round half to even. The result is exact below 2^22, and beyond a code's range above."""
    return (value + 12582912.0) - 12582912.0


@triton.jit
def clamped(value, low, high):
    """`torch.clamp`; NaN becomes `low`, which is stored where a scale overflows."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def float16_scale(scale):
    """As `grid.float16_scale`: what is at most half of the smallest float16 would become 0."""
    smallest = tl.where(scale < 0, -5.9604644775390625e-8, 5.9604644775390625e-8)
    rounded = scale.to(tl.float16).to(tl.float32)
    return tl.where(tl.abs(scale) <= 2.98023223876953125e-8, smallest, rounded)


@triton.jit
def lowest(low, place, used, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """The first code of each column, float32; `low` is not read where it is the same of all."""
    if SYMMETRIC:
        first = tl.zeros(place.shape, tl.float32) - (1 << (BITS - 1))
    else:
        first = tl.load(low + place, mask=used, other=0.0)
    return first


@triton.jit
def solved(carried, upper, used, N, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The x of `upper x = carried`, [SIZE, COLUMNS]; `carried` are the places of row 0."""
    at = tl.arange(0, SIZE)
    carried += (SIZE - 1) * N
    row, pivot = upper + (SIZE - 1) * SIZE, upper + SIZE * SIZE - 1
    found = tl.zeros([SIZE, COLUMNS], tl.float32)
    for back in range(SIZE):
        value = tl.load(carried, mask=used, other=0.0)
        value -= tl.sum(tl.load(row + at)[:, None] * found, 0)
        value = value / tl.load(pivot)
        found = tl.where(at[:, None] == SIZE - 1 - back, value[None, :], found)
        carried -= N
        row -= SIZE
        pivot -= SIZE + 1
    return found


@triton.jit(do_not_specialize=_LENGTHS)
def search_grid(
    weights, carried, upper, clips, scale, low, high, N, matrix_stride, candidates, other_sign,
    SIZE: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, LIVE: tl.constexpr,
    SIGNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """scale, low and high [B, N] of the grid of least weighted error; grid (N / COLUMNS, B).

    Args:
        weights: [B, g, N] in rows of [B, K, N]. carried: [B, g, N].
        upper: [B, g, g], the transposed block of the Cholesky factor.
        clips: [2, candidates], each clipping as a fraction, and what makes a step of an extreme.
        other_sign: what turns a step into that of the other sign, if SIGNS is 2.
        LIVE: the grid is that of the weights with compensation.
    """
    matrix = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    used, at = output < N, tl.arange(0, SIZE)
    upper += matrix * SIZE * SIZE
    if LIVE:
        group = solved(carried + matrix * SIZE * N + output, upper, used, N, SIZE, COLUMNS)
    else:
        group = tl.zeros([SIZE, COLUMNS], tl.float32)
    rows = weights + matrix * matrix_stride + output[None, :] + at[:, None] * N
    group += tl.load(rows, mask=used[None, :], other=0.0)
    pivots = tl.load(upper + at * SIZE + at)
    importance = pivots * pivots
    smallest, largest = tl.min(group, 0), tl.max(group, 0)
    last = (1 << BITS) - 1
    half = 1 << (BITS - 1)
    if SYMMETRIC:
        extreme = tl.where(largest >= -smallest, largest, smallest)
    else:
        smallest = tl.minimum(smallest, 0.0)
        extreme = tl.maximum(largest, 0.0) - smallest
    best_scale = tl.zeros([COLUMNS], tl.float32)
    best_low = tl.zeros([COLUMNS], tl.float32)
    least = tl.zeros([COLUMNS], tl.float32)
    for candidate in range(candidates * SIGNS):
        clip = candidate // SIGNS
        tried = float16_scale(extreme * tl.load(clips + candidates + clip))
        if SIGNS == 2:
            tried = tl.where(candidate % 2 == 1, float16_scale(tried * other_sign), tried)
        if SYMMETRIC:
            first = tl.zeros([COLUMNS], tl.float32) - half
        else:
            zero = nearest(tl.div_rn(smallest * -tl.load(clips + clip), tried))
            first = -clamped(zero, 1.0, last * 1.0)
        units = group * tl.div_rn(1.0, tried)[None, :]
        missed = units - clamped(nearest(units), first[None, :], first[None, :] + last)
        loss = tl.sum(missed * missed * importance[:, None], 0) * tried * tried
        better = (loss < least) | (candidate == 0)
        best_scale = tl.where(better, tried, best_scale)
        best_low = tl.where(better, first, best_low)
        least = tl.where(better, loss, least)
    tl.store(scale + matrix * N + output, best_scale, mask=used)
    if not SYMMETRIC:
        tl.store(low + matrix * N + output, best_low, mask=used)
        tl.store(high + matrix * N + output, best_low + last, mask=used)


@triton.jit
def least_of_each(loss, TRIALS: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether a column's loss is the first of the least among the R of its output."""
    losses = tl.reshape(loss, [COLUMNS // R, R])
    trials = tl.arange(0, R)[None, :]
    ties = tl.where(losses == tl.min(losses, 1)[:, None], trials, TRIALS - 1)  # of NaN: the last
    return tl.reshape(trials == tl.min(ties, 1)[:, None], [COLUMNS])


@triton.jit(do_not_specialize=_LENGTHS)
def round_group(
    weights, carried, upper, factors, scale, low, kept, codes, errors, N, matrix_stride,
    SIZE: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, TRIALS: tl.constexpr,
    R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Round a group with each trial's scale and keep the best; grid (N / (COLUMNS / R), B).

    A column is a pair of an output and a trial. R is TRIALS, rounded up to a power of 2.

    Args:
        weights, codes, errors: [B, g, N] in rows of [B, K, N]. carried: [B, g, N].
        upper: as in `search_grid`. factors: [TRIALS], of the scales.
        scale, low, kept: [B, N]; kept are the scales that were best.
    """
    OUTPUTS: tl.constexpr = COLUMNS // R
    matrix = tl.program_id(1).to(tl.int64)
    column, at = tl.arange(0, COLUMNS), tl.arange(0, SIZE)
    output, trial = tl.program_id(0) * OUTPUTS + column // R, column % R
    used = output < N
    upper += matrix * SIZE * SIZE
    weights += matrix * matrix_stride + output
    carried += matrix * SIZE * N + output
    factor = tl.load(factors + tl.minimum(trial, TRIALS - 1))
    tried = tl.load(scale + matrix * N + output, mask=used, other=1.0)
    tried = float16_scale(tried * factor)
    last = (1 << BITS) - 1
    first = lowest(low, matrix * N + output, used, BITS, SYMMETRIC)
    inverse = tl.div_rn(1.0, tried)
    missed = tl.zeros([SIZE, COLUMNS], tl.float32)  # weights minus codes, in steps
    loss = tl.zeros([COLUMNS], tl.float32)
    end = (SIZE - 1) * N
    weight_row, carried_row = weights + end, carried + end
    row, diagonal = upper + (SIZE - 1) * SIZE, upper + SIZE * SIZE - 1
    for back in range(SIZE):
        pivot = tl.load(diagonal)
        compensation = tl.load(carried_row, mask=used, other=0.0) * inverse
        compensation += tl.sum(tl.load(row + at)[:, None] * missed, 0)
        steps = tl.load(weight_row, mask=used, other=0.0) * inverse
        target = steps + compensation / pivot
        code = clamped(nearest(target), first, first + last)
        residual = (target - code) * pivot
        loss += residual * residual
        missed = tl.where(at[:, None] == SIZE - 1 - back, (steps - code)[None, :], missed)
        weight_row -= N
        carried_row -= N
        row -= SIZE
        diagonal -= SIZE + 1
    loss = tl.where(trial < TRIALS, loss * tried * tried, float("inf"))
    best = least_of_each(loss, TRIALS, R, COLUMNS) & used
    tl.store(kept + matrix * N + output, tried, mask=best)
    place = at[:, None] * N
    exact = tl.load(weights[None, :] + place, mask=best[None, :], other=0.0)
    # The code was subtracted from these same steps, so that this is whole to within a rounding.
    code = nearest(exact * inverse[None, :] - missed)
    place += matrix * matrix_stride + output[None, :]
    tl.store(codes + place, code.to(tl.int16), mask=best[None, :])
    tl.store(errors + place, exact - code * tried[None, :], mask=best[None, :])


@triton.jit
def scale_change(
    chosen, code_row, gradient_row, row, used, N, row_stride,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What moves the scale of codes `chosen` [SIZE, COLUMNS] to its optimum; the rows are row 0."""
    at = tl.arange(0, SIZE)
    slope = tl.zeros([COLUMNS], tl.float32)
    curvature = tl.zeros([COLUMNS], tl.float32)
    for _ in range(SIZE):
        code = tl.load(code_row, mask=used, other=0).to(tl.float32)
        curvature += tl.sum(tl.load(row + at)[:, None] * chosen, 0) * code
        slope += tl.load(gradient_row, mask=used, other=0.0) * code
        code_row += N
        gradient_row += N
        row += row_stride
    return tl.where(curvature > 0, slope / tl.where(curvature > 0, curvature, 1.0), 0.0)


@triton.jit(do_not_specialize=_LENGTHS)
def refine_group(
    weights, gradient, hessian, scale, low, moved, codes, errors, N, matrix_stride, hessian_stride,
    row_stride,
    SIZE: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Move the scales to their optimum, then each code, all else fixed; grid (N / COLUMNS, B).

    Args:
        weights, codes, errors: [B, g, N] in rows of [B, K, N]; codes and errors are replaced.
        gradient: [B, g, N], H times all errors of the matrix.
        hessian: [B, g, g], the group's block of H, with these strides.
        scale, low, moved: [B, N]; moved are the new scales.
    """
    matrix = tl.program_id(1).to(tl.int64)
    output = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    used, at = output < N, tl.arange(0, SIZE)
    hessian += matrix * hessian_stride
    gradient += matrix * SIZE * N + output
    base = matrix * matrix_stride + output
    places = base[None, :] + at[:, None] * N
    chosen = tl.load(codes + places, mask=used[None, :], other=0).to(tl.float32)
    change = scale_change(
        chosen, codes + base, gradient, hessian, used, N, row_stride, SIZE, COLUMNS
    )
    before = tl.load(scale + matrix * N + output, mask=used, other=1.0)
    step = float16_scale(before + change)
    tl.store(moved + matrix * N + output, step, mask=used)
    last = (1 << BITS) - 1
    first = lowest(low, matrix * N + output, used, BITS, SYMMETRIC)
    inverse = tl.div_rn(1.0, step)
    shift = before - step
    changes = chosen * shift[None, :]  # of the errors, since the gradient was taken
    code_row, gradient_row, row, diagonal = codes + base, gradient, hessian, hessian
    for k in range(SIZE):
        code = tl.load(code_row, mask=used, other=0).to(tl.float32)
        slope = tl.load(gradient_row, mask=used, other=0.0)
        slope += tl.sum(tl.load(row + at)[:, None] * changes, 0)
        target = code + slope * inverse / tl.load(diagonal)
        better = clamped(nearest(target), first, first + last)
        change = code * before - better * step
        changes = tl.where(at[:, None] == k, change[None, :], changes)
        code_row += N
        gradient_row += N
        row += row_stride
        diagonal += row_stride + 1
    tl.debug_barrier()  # another lane may still read the codes that this one replaces
    chosen = tl.load(codes + places, mask=used[None, :], other=0).to(tl.float32)
    chosen = nearest((chosen * before[None, :] - changes) * inverse[None, :])
    exact = tl.load(weights + places, mask=used[None, :], other=0.0)
    tl.store(codes + places, chosen.to(tl.int16), mask=used[None, :])
    tl.store(errors + places, exact - chosen * step[None, :], mask=used[None, :])
