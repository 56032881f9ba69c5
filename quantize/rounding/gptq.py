"""GPTQ: rounds a weight so that its products with what it really sees change least.

The loss of rounding W to Q is `tr (W - Q) H (W - Q)^T`, H the sum of `x x^T` over the inputs x that
the matrix saw (arXiv 2210.17323). With `H = L L^T` it is `|(W - Q) L|^2`: input after input, from the
last, is rounded to what cancels the errors so far. That is the paper's greedy solution (arXiv
2307.13304, theorem 6) from one Cholesky factorisation and no inverse. Coordinate descent follows.

Shape letters: B matrices at once, N outputs, K inputs, g inputs of a group, G groups, R trials.
Weights are kept as [B, K, N] here, so that an input of all outputs is one run of memory. Knows
nothing of files, models or where H comes from.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.quantize.rounding import grid as scales
from qmix.quantize.rounding.grid import Grid
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.integers import Int4, Int8
from qmix.weights.scheme import Scheme

_BLOCK = 32  # inputs rounded one by one before the rest of their group is updated by one product
_DAMPINGS = 4  # the damping is raised tenfold so often, then H is given up
_LEAST_SAMPLES = 8  # with fewer inputs H is given up
_TRIAL_SPAN = 0.05  # of scales around the best; 0.2 gains a tenth less, 0.02 a third less
_ERROR_ROWS = 1024  # outputs over which the output error is taken
# Weights in one slab of trials: 4 MiB of float32 stay in a processor's cache; a GPU wants few launches.
_TRIAL_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a weight is rounded; each switch is a row of the ablation in evals/LOG.md.

    Attributes:
        damping: least share of H's mean diagonal that is added to the diagonal; see `damping_of`.
        act_order: groups, and the inputs within each, in descending order of H's diagonal.
        live_scales: a group's scales are chosen for its error-compensated weights.
        scale_search: scales minimise the H-weighted error over clippings of either sign; else the
            largest magnitude lies half a step beyond the last code.
        trials: scales close to the chosen one with which a group is rounded; the best one stays.
        refine: rounds of coordinate descent over scales and codes.
    """

    damping: float = 0.002
    act_order: bool = True
    live_scales: bool = True
    scale_search: bool = True
    trials: int = 8
    refine: int = 3


@dataclass(frozen=True, eq=False)
class Solution:
    """One rounded weight.

    Attributes:
        weight: on the CPU.
        output_error: `|(W - Q) x| / |W x|` over the inputs that H is made of, W corrected if crossed;
            None without any.
        damping: the share that H needed; None if H was given up.
        raised: how often that was raised tenfold.
        fallback: why H was given up and the weight rounded to nearest; None if it was not.
    """

    weight: Int4 | Int8
    output_error: float | None
    damping: float | None
    raised: int
    fallback: str | None


def damping_of(inputs: int, samples: float, least: float) -> float:
    """The damping for an H of `samples` inputs of width `inputs`: K / 2T, the fewer the more.

    Measured on held-out inputs of trained experts, the best was 10 at T = K / 16, 3 at K / 4, 1 at K,
    0.1 at 4 K, 0.03 at 15 K; with it 16 inputs already beat rounding to nearest (evals/LOG.md).
    """
    return max(least, inputs / (2 * samples))


def solve(
    weights: Tensor,
    moments: Sequence[Moments],
    scheme: Scheme,
    options: Options,
    *,
    where: Sequence[str],
    parts: Sequence[int] | None = None,
) -> list[list[Solution]]:
    """Round B weights of one shape, each for its own inputs.

    An H of fewer than 8 inputs, or that no damping makes positive definite, is replaced by the
    identity, which is rounding to nearest (with the same search for scales).

    Args:
        weights: [B, N, K], any floating dtype, on the CPU or a GPU.
        moments: of each one's inputs, there too; overwritten. Where they are crossed, W is replaced
            by what reproduces the unrounded outputs best, `W C H^-1`, C the sum of `e x^T`.
        scheme: `int4` or `int8`; its group size divides K.
        where: file and tensor of each, for errors.
        parts: outputs of the matrices that are stacked in each weight; default: one, N.

    Returns:
        For each weight the solutions of its parts.

    Raises:
        CheckpointError: NaN or infinity, or a weight beyond the scales of float16.
    """
    for name, weight, moment in zip(where, weights, moments, strict=True):
        for what, tensor in (("weight", weight), ("sum over its inputs", moment.hessian)):
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"NaN or infinity in the {what}", where=name)
    columns = weights.shape[2]
    size = columns if scheme.group_size == -1 else scheme.group_size
    assert columns % size == 0, (columns, size)
    order = torch.stack([_order(m.hessian.diagonal(), size, options.act_order) for m in moments])
    lower = torch.empty(len(order), columns, columns, device=weights.device)
    targets = torch.empty(len(order), columns, weights.shape[1], device=weights.device)
    factors = []
    for index, moment in enumerate(moments):
        perm = order[index]
        moment.hessian.copy_(moment.hessian[perm][:, perm])
        factor = _factor(moment.hessian, lower[index], moment.samples, options.damping)
        targets[index] = weights[index].T[perm]
        if moment.cross is not None and not factor.fallback:
            moment.cross.copy_(moment.cross[perm][:, perm])
            moment.cross.diagonal().add_(factor.added)
            torch.cholesky_solve(moment.cross.T @ targets[index], lower[index], out=targets[index])
        factors.append(factor)
    hessians = [moment.hessian for moment in moments]
    stacked = hessians[0][None] if len(hessians) == 1 else torch.stack(hessians)
    run = _Run(targets, order, stacked, scheme, options)
    run.greedy(lower)
    del lower  # 0.8 GB for w2
    for _ in range(options.refine):
        run.refine()
    for name, bad in zip(where, run.beyond(), strict=True):
        if bad:
            raise CheckpointError(
                "weights too large for float16 scales", where=name, expected="scales below 65504"
            )
    bounds = [0, *accumulate(parts or [weights.shape[1]])]
    return [
        [run.solution(index, slice(*rows), factor) for rows in pairwise(bounds)]
        for index, factor in enumerate(factors)
    ]


def _order(diagonal: Tensor, size: int, act_order: bool) -> Tensor:
    """int64 [K]: inputs as they are stored here; the last is rounded first.

    Groups stay whole, so that the file needs no g_idx and a group's live weights are known when its
    turn comes. Ordering all inputs alike had a loss 0.6 % lower at g128, 3 % higher at g32.
    """
    if not act_order:
        return torch.arange(len(diagonal), device=diagonal.device).flip(0)
    grouped = diagonal.view(-1, size)
    groups = grouped.mean(1).argsort(stable=True)
    inner = grouped.argsort(dim=1, stable=True)[groups]
    return (groups[:, None] * size + inner).view(-1)


@dataclass(frozen=True)
class _Factor:
    """How an H was factored: `added` to its diagonal, `raised` times tenfold; see `Solution`."""

    share: float | None
    added: float
    raised: int
    fallback: str | None


def _factor(hessian: Tensor, lower: Tensor, samples: float, least: float) -> _Factor:
    """Write the Cholesky factor of the damped H into `lower`; H is damped, or made 1, in place."""
    columns = hessian.shape[0]
    fallback = f"fewer than {_LEAST_SAMPLES} tokens"
    if samples >= _LEAST_SAMPLES:
        diagonal = hessian.diagonal()
        exact, mean = diagonal.clone(), float(diagonal.mean())
        share = damping_of(columns, samples, least)
        for raised in range(_DAMPINGS + 1):
            diagonal.copy_(exact + share * mean)
            info = torch.empty(0, dtype=torch.int32, device=hessian.device)
            torch.linalg.cholesky_ex(hessian, out=(lower, info))
            if not int(info):
                return _Factor(share, share * mean, raised, None)
            share *= 10
        fallback = "not positive definite"
    for matrix in (hessian, lower):
        matrix.zero_()
        matrix.fill_diagonal_(1)
    return _Factor(None, 0.0, 0, fallback)


class _Run:
    """The state of one solve: weights, errors and codes in processing order, grids by group."""

    def __init__(
        self, weights: Tensor, order: Tensor, hessians: Tensor, scheme: Scheme, options: Options
    ) -> None:
        self.weights, self.order, self.hessians = weights, order, hessians
        self.scheme, self.options = scheme, options
        columns = weights.shape[1]
        self.size = columns if scheme.group_size == -1 else scheme.group_size
        self.errors = torch.zeros_like(weights)
        self.codes = torch.zeros_like(weights, dtype=torch.int16)
        self.grids: dict[int, Grid] = {}  # by first input of the group

    def greedy(self, lower: Tensor) -> None:
        """Group after group from the last: choose its grid, then round its inputs.

        Args:
            lower: [B, K, K], of H.
        """
        columns = self.weights.shape[1]
        for first in range(columns - self.size, -1, -self.size):
            part = slice(first, first + self.size)
            weights, own = self.weights[:, part], lower[:, part, part]
            pivots = own.diagonal(dim1=1, dim2=2)[:, :, None]
            after = slice(first + self.size, columns)
            carried = lower[:, after, part].mT @ self.errors[:, after]
            live = weights
            if self.options.live_scales:
                live = weights + torch.linalg.solve_triangular(own.mT, carried, upper=True)
            grid = (
                scales.search(live, pivots.square(), self.scheme)
                if self.options.scale_search
                else scales.plain(live, self.scheme)
            )
            targets = carried.div_(pivots).add_(weights)
            trials = self.options.trials
            if trials > 1:
                span = torch.linspace(-_TRIAL_SPAN, _TRIAL_SPAN, trials, device=weights.device)
                factors = 1 + span
            else:
                factors = torch.ones(1, device=weights.device)
            step = max(
                1, _TRIAL_ELEMENTS[weights.device.type] // (weights[:, :, 0].numel() * trials)
            )
            slabs = [
                _round_group(
                    weights[..., rows], targets[..., rows], _rows(grid, rows), own, factors
                )
                for rows in _slices(weights.shape[2], step)
            ]
            self.codes[:, part] = torch.cat([codes for codes, _ in slabs], 2)
            self.grids[first] = _concatenated([grid for _, grid in slabs])
            self._refresh_errors(part)

    def refine(self) -> None:
        """One round: each group's scale to its optimum, then each of its codes, all else fixed."""
        for first, grid in self.grids.items():
            part = slice(first, first + self.size)
            own = self.hessians[:, part, part]
            errors = self.errors[:, part]
            gradient = self.hessians[:, part] @ self.errors
            codes = self.codes[:, part].float()
            products = own @ codes
            curvature = (products * codes).sum(1)
            change = (gradient * codes).sum(1) / curvature
            scale = grid.scale + torch.where(curvature > 0, change, 0)
            better = grid.rescaled(scale)
            moved = (better.scale - grid.scale)[:, None]
            errors.addcmul_(codes, moved, value=-1)
            gradient.addcmul_(products, moved, value=-1)
            self.grids[first] = better
            _descend(errors, codes, gradient, own, better)
            self.codes[:, part] = codes
            self._refresh_errors(part)

    def _refresh_errors(self, part: slice) -> None:
        scale = self.grids[part.start].scale[:, None]
        self.errors[:, part] = self.weights[:, part] - self.codes[:, part] * scale

    def beyond(self) -> list[bool]:
        """Which matrices have a scale beyond float16."""
        finite = [torch.isfinite(grid.scale).all(1) for grid in self.grids.values()]
        return torch.stack(finite).all(0).logical_not().tolist()

    def solution(self, index: int, rows: slice, factor: _Factor) -> Solution:
        """Outputs `rows` of matrix `index`, the inputs in the layer's order."""
        order = self.order[index]
        groups = torch.stack([order[first] for first in self.grids]) // self.size
        by_group = [list(self.grids.items())[i] for i in torch.argsort(groups).tolist()]
        scale = torch.stack([grid.scale[index, rows] for _, grid in by_group], 1)
        lows = torch.stack([grid.low.expand_as(grid.scale)[index, rows] for _, grid in by_group], 1)
        stored = torch.empty_like(self.codes[index, :, rows], dtype=torch.uint8)
        for group, (first, _) in enumerate(by_group):
            part = slice(first, first + self.size)
            stored[order[part]] = (self.codes[index, part, rows] - lows[:, group]).to(torch.uint8)
        kind = Int4 if self.scheme.kind == "int4" else Int8
        weight = kind(
            codes=kind.packed(stored.T.contiguous().cpu()),
            scales=scale.half().cpu(),
            zeros=None if self.scheme.symmetric else (-lows).to(torch.uint8).cpu(),
        )
        error = None if factor.fallback else self._output_error(index, rows, factor.added)
        return Solution(weight, error, factor.share, factor.raised, factor.fallback)

    def _output_error(self, index: int, rows: slice, added: float) -> float:
        sample = slice(rows.start, rows.stop, -(-(rows.stop - rows.start) // _ERROR_ROWS))
        losses = []
        for matrix in (self.errors[index, :, sample], self.weights[index, :, sample]):
            whole = float(((self.hessians[index] @ matrix) * matrix).sum())
            losses.append(max(0.0, whole - added * float(matrix.square().sum())))
        return float((losses[0] / losses[1]) ** 0.5) if losses[1] else 0.0


def _round_group(
    weights: Tensor, targets: Tensor, grid: Grid, lower: Tensor, factors: Tensor
) -> tuple[Tensor, Grid]:
    """Round one group, once a trial; the trial of least loss: codes [B, g, n] and its grid.

    Args:
        weights, targets: [B, g, n], as they are and as the errors so far want them.
        lower: [B, g, g]. factors: [R], of the scales.
    """
    size = weights.shape[1]
    pivots = lower.diagonal(dim1=1, dim2=2)  # [B, g]
    tried = grid.scaled(factors[:, None, None])  # [R, B, n]
    targets = targets.expand(len(factors), *targets.shape).clone()
    codes = torch.empty_like(targets)
    errors = torch.empty_like(targets)
    loss = torch.zeros_like(tried.scale)
    for stop in range(size, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        for k in range(stop - 1, start - 1, -1):
            code = tried.nearest(targets[:, :, k])
            codes[:, :, k] = code
            value = code.mul_(tried.scale)
            missed = (targets[:, :, k] - value).mul_(pivots[:, k, None])
            loss.addcmul_(missed, missed)
            torch.sub(weights[:, k], value, out=errors[:, :, k])
            if k > start:
                shares = lower[:, k, start:k] / pivots[:, start:k]
                targets[:, :, start:k].addcmul_(shares[..., None], errors[:, :, k, None])
        if start:
            shares = lower[:, start:stop, :start].mT / pivots[:, :start, None]
            targets[:, :, :start] += shares @ errors[:, :, start:stop]
    best = loss.argmin(0, keepdim=True)  # [1, B, n]
    chosen = codes.gather(0, best[:, :, None].expand(1, *codes.shape[1:]))[0]
    return chosen, grid.rescaled(tried.scale.gather(0, best)[0])


def _descend(errors: Tensor, codes: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid) -> None:
    """Move each code of a group to its best, the others fixed; `codes` [B, g, N] in place.

    Args:
        errors: [B, g, N]. gradient: [B, g, N], H times all errors; both are overwritten.
        hessian: [B, g, g].
    """
    size = codes.shape[1]
    curvature = hessian.diagonal(dim1=1, dim2=2)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        for k in range(start, stop):
            value = codes[:, k] * grid.scale
            best = grid.nearest(value + gradient[:, k] / curvature[:, k, None])
            codes[:, k] = best
            # From here on `errors` holds what this error changed by.
            torch.sub(value, best.mul_(grid.scale), out=errors[:, k])
            if k + 1 < stop:
                row = hessian[:, k, k + 1 : stop, None]
                gradient[:, k + 1 : stop].addcmul_(row, errors[:, k, None])
        if stop < size:
            gradient[:, stop:] += hessian[:, stop:, start:stop] @ errors[:, start:stop]


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _rows(grid: Grid, rows: slice) -> Grid:
    wide = [part if part.dim() == 0 else part[..., rows] for part in (grid.low, grid.high)]
    return Grid(grid.scale[..., rows], *wide)


def _concatenated(grids: list[Grid]) -> Grid:
    if len(grids) == 1:
        return grids[0]
    lows, highs = [grid.low for grid in grids], [grid.high for grid in grids]
    return Grid(
        torch.cat([grid.scale for grid in grids], -1),
        lows[0] if lows[0].dim() == 0 else torch.cat(lows, -1),
        highs[0] if highs[0].dim() == 0 else torch.cat(highs, -1),
    )
