"""GPTQ: rounds a weight so that its products with the inputs it really gets change least.

The loss of rounding W to Q is `tr (W - Q) H (W - Q)^T`, where H is the sum of `x x^T` over the
inputs x of the matrix (https://arxiv.org/abs/2210.17323). With `H = L L^T` it is `|(W - Q) L|^2`.
Starting with the last input, each input is rounded to what cancels the errors made so far. This is
the paper's greedy solution (https://arxiv.org/abs/2307.13304, theorem 6), but it needs only one
Cholesky factorisation and no inverse. Coordinate descent follows.

Shape letters: B matrices at once, N outputs, K inputs, g inputs of a group, G groups. Weights are
kept as [B, K, N] here, so that one input of all outputs is contiguous. Knows nothing of files,
models or where H comes from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.quantize.rounding.gptq_group import descend, round_group
from qmix.quantize.rounding.grid import Grid, absmax_grid, search_grid
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.dense import all_finite
from qmix.weights.scheme import Scheme

_DAMPING_RAISES = 4  # how often the damping is raised tenfold before H is given up
_MIN_SAMPLES = 8  # with fewer inputs H is given up
_ERROR_ROWS = 1024  # outputs over which the output error is measured
# Shares of a solve's time on a CPU: the factor, the greedy pass, and all rounds after it.
_FACTOR_SHARE, _GREEDY_SHARE, _LAST_SHARE = 0.15, 0.5, 0.35


@dataclass(frozen=True, kw_only=True)
class RoundingOptions:
    """How a weight is rounded. Each switch is a row of the ablation in evals/LOG.md.

    Attributes:
        damping: the least fraction of H's mean diagonal that is added to the diagonal; see
            `damping_of`.
        act_order: order the groups, and the inputs within each, by descending diagonal of H.
        live_scales: choose a group's scales for its error-compensated weights.
        scale_search: choose scales that minimise the H-weighted error over clippings of either
            sign. Without it the largest magnitude lies half a step beyond the last code.
        trials: how many scales close to the chosen one each group is rounded with; the best stays.
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
        output_error: `|(W - Q) x| / |W x|` over the inputs that H is made of, where W is the
            corrected weight if the moments are crossed; None without inputs.
        damping: the fraction that H needed; None if H was given up.
        raised: how often the damping was raised tenfold.
        fallback: why H was given up and the weight rounded to nearest; None if it was not.
    """

    weight: Affine
    output_error: float | None
    damping: float | None
    raised: int
    fallback: str | None


def damping_of(inputs: int, samples: float, least: float) -> float:
    """The damping for an H of `samples` inputs of width `inputs`: K / 2T, so more for fewer inputs.

    The best damping on held-out inputs of trained experts was 10 at T = K / 16, 3 at K / 4, 1 at K,
    0.1 at 4 K and 0.03 at 15 K. With it 16 inputs already beat rounding to nearest (evals/LOG.md).
    """
    return max(least, inputs / (2 * samples))


def solve(
    weights: Tensor,
    moments: Sequence[Moments],
    scheme: Scheme,
    options: RoundingOptions,
    *,
    where: Sequence[str],
    parts: Sequence[int] | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> list[list[Solution]]:
    """Round B weights of one shape, each for its own inputs.

    If H has fewer than 8 inputs, or no damping makes it positive definite, the identity takes its
    place. That is rounding to nearest, with the same search for scales.

    Args:
        weights: [B, N, K], any floating dtype, on the CPU or a GPU.
        moments: of the inputs of each weight, on the same device; overwritten. If they are crossed,
            W is replaced by the weight that reproduces the unrounded outputs best, `W C H^-1`,
            where C is the sum of `e x^T`.
        scheme: `int4` or `int8`; its group size must divide K.
        where: file and tensor of each weight, for errors.
        parts: numbers of outputs of the matrices stacked in each weight; by default one matrix, N.
        tell: called now and then with the share of the time that is over.

    Returns:
        For each weight the solutions of its parts.

    Raises:
        CheckpointError: NaN or infinity, or a weight too large for float16 scales.
    """
    _check_finite(weights, moments, where)
    columns = weights.shape[2]
    size = _group_size(columns, scheme)
    order = torch.stack(
        [_input_order(m.hessian.diagonal(), size, options.act_order) for m in moments]
    )
    lower = torch.empty(len(order), columns, columns, device=weights.device)
    targets = torch.empty(len(order), columns, weights.shape[1], device=weights.device)
    factors = [
        _prepare(moment, weight, perm, lower[index], targets[index], options.damping)
        for index, (moment, weight, perm) in enumerate(zip(moments, weights, order, strict=True))
    ]
    hessians = _stacked([moment.hessian for moment in moments])
    solver = _Solver(targets, order, hessians, scheme, options)
    solver.round_greedily(lower, partial(_tell_part, tell, _FACTOR_SHARE, _GREEDY_SHARE))
    del lower  # 0.8 GB for w2
    for index in range(options.refine):
        before, part = 1 - _LAST_SHARE * (1 - index / options.refine), _LAST_SHARE / options.refine
        solver.refine(partial(_tell_part, tell, before, part))
    for name, overflows in zip(where, solver.scale_overflows(), strict=True):
        if overflows:
            raise CheckpointError(
                "weights too large for float16 scales", where=name, expected="scales below 65504"
            )
    bounds = [0, *accumulate(parts or [weights.shape[1]])]
    return [
        [solver.solution(index, slice(*rows), factor) for rows in pairwise(bounds)]
        for index, factor in enumerate(factors)
    ]


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """[B, K, K]; one matrix is not copied: it may have 0.8 GB."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


def _tell_part(tell: Callable[[float], None], before: float, part: float, share: float) -> None:
    """Tell a share of a part."""
    tell(before + part * share)


def _group_size(columns: int, scheme: Scheme) -> int:
    """The inputs of a group, of K in all."""
    size = columns if scheme.group_size == -1 else scheme.group_size
    assert columns % size == 0, (columns, size)
    return size


def _check_finite(weights: Tensor, moments: Sequence[Moments], where: Sequence[str]) -> None:
    for name, weight, moment in zip(where, weights, moments, strict=True):
        for what, tensor in (("weight", weight), ("sum over its inputs", moment.hessian)):
            if not all_finite(tensor):
                raise CheckpointError(f"NaN or infinity in the {what}", where=name)


def _input_order(diagonal: Tensor, size: int, act_order: bool) -> Tensor:
    """The inputs in processing order, int64 [K]; the last one is rounded first.

    Groups stay whole. The file then needs no g_idx, and a group's live weights are known when its
    turn comes. Ordering all inputs alike had a loss 0.6 % lower at g128 and 3 % higher at g32.
    """
    if not act_order:
        return torch.arange(len(diagonal), device=diagonal.device).flip(0)
    grouped = diagonal.view(-1, size)
    groups = grouped.mean(1).argsort(stable=True)
    inner = grouped.argsort(dim=1, stable=True)[groups]
    return (groups[:, None] * size + inner).view(-1)


@dataclass(frozen=True)
class _Factor:
    """How an H was factored.

    Attributes:
        damping: the damping as a fraction of the mean diagonal; None if H was given up.
        added: the number that was added to the diagonal.
        raised, fallback: see `Solution`.
    """

    damping: float | None
    added: float
    raised: int
    fallback: str | None


def _prepare(
    moment: Moments, weight: Tensor, order: Tensor, lower: Tensor, target: Tensor, damping: float
) -> _Factor:
    """Permute and factor H into `lower` [K, K], and write the weight to be rounded into `target`.

    Args:
        weight: [N, K].
        order: [K], see `_input_order`.
        target: [K, N].
    """
    moment.hessian.copy_(moment.hessian[order][:, order])
    factor = _factorise(moment.hessian, lower, moment.samples, damping)
    target.copy_(weight.T[order])
    if moment.cross is not None and not factor.fallback:
        moment.cross.copy_(moment.cross[order][:, order])
        moment.cross.diagonal().add_(factor.added)
        torch.cholesky_solve(moment.cross.T @ target, lower, out=target)
    return factor


def _factorise(hessian: Tensor, lower: Tensor, samples: float, least: float) -> _Factor:
    """Write the Cholesky factor of the damped H into `lower`.

    H itself is damped in place, or becomes the identity if it is given up.
    """
    columns = hessian.shape[0]
    fallback = f"fewer than {_MIN_SAMPLES} tokens"
    if samples >= _MIN_SAMPLES:
        diagonal = hessian.diagonal()
        exact, mean = diagonal.clone(), float(diagonal.mean())
        damping = damping_of(columns, samples, least)
        for raised in range(_DAMPING_RAISES + 1):
            diagonal.copy_(exact + damping * mean)
            info = torch.empty(0, dtype=torch.int32, device=hessian.device)
            torch.linalg.cholesky_ex(hessian, out=(lower, info))
            if not int(info):
                return _Factor(damping, damping * mean, raised, None)
            damping *= 10
        fallback = "not positive definite"
    for matrix in (hessian, lower):
        matrix.zero_()
        matrix.fill_diagonal_(1)
    return _Factor(None, 0.0, 0, fallback)


class _Solver:
    """The state of one solve: weights, errors and codes in processing order, grids by group."""

    def __init__(
        self,
        weights: Tensor,
        order: Tensor,
        hessians: Tensor,
        scheme: Scheme,
        options: RoundingOptions,
    ) -> None:
        self.weights, self.order, self.hessians = weights, order, hessians
        self.scheme, self.options = scheme, options
        self.size = _group_size(weights.shape[1], scheme)
        self.errors = torch.zeros_like(weights)
        self.codes = torch.zeros_like(weights, dtype=torch.int16)
        self.grids: dict[int, Grid] = {}  # by first input of the group

    def round_greedily(self, lower: Tensor, tell: Callable[[float], None]) -> None:
        """Starting with the last group, choose each group's grid and round its inputs.

        Args:
            lower: [B, K, K], the Cholesky factors of the H.
        """
        columns = self.weights.shape[1]
        for first in range(columns - self.size, -1, -self.size):
            tell(1 - (first + self.size) / columns)
            part = slice(first, first + self.size)
            weights, block = self.weights[:, part], lower[:, part, part]
            pivots = block.diagonal(dim1=1, dim2=2)[:, :, None]
            after = slice(first + self.size, columns)
            carried = lower[:, after, part].mT @ self.errors[:, after]
            live = weights
            if self.options.live_scales:
                live = weights + torch.linalg.solve_triangular(block.mT, carried, upper=True)
            grid = (
                search_grid(live, pivots.square(), self.scheme)
                if self.options.scale_search
                else absmax_grid(live, self.scheme)
            )
            targets = carried.div_(pivots).add_(weights)
            codes, grid = round_group(weights, targets, grid, block, self.options.trials)
            self.codes[:, part] = codes
            self.grids[first] = grid
            self._refresh_errors(part)

    def refine(self, tell: Callable[[float], None]) -> None:
        """One round: move each group's scale to its optimum, then each code, all else fixed."""
        for done, (first, grid) in enumerate(self.grids.items()):
            tell(done / len(self.grids))
            part = slice(first, first + self.size)
            block = self.hessians[:, part, part]
            errors = self.errors[:, part]
            gradient = self.hessians[:, part] @ self.errors
            codes = self.codes[:, part].float()
            hessian_codes = block @ codes
            curvature = (hessian_codes * codes).sum(1)
            change = (gradient * codes).sum(1) / curvature
            scale = grid.scale + torch.where(curvature > 0, change, 0)
            better = grid.rescaled(scale)
            moved = (better.scale - grid.scale)[:, None]
            errors.addcmul_(codes, moved, value=-1)
            gradient.addcmul_(hessian_codes, moved, value=-1)
            self.grids[first] = better
            descend(errors, codes, gradient, block, better)
            self.codes[:, part] = codes
            self._refresh_errors(part)

    def _refresh_errors(self, part: slice) -> None:
        scale = self.grids[part.start].scale[:, None]
        self.errors[:, part] = self.weights[:, part] - self.codes[:, part] * scale

    def scale_overflows(self) -> list[bool]:
        """For each matrix, whether a scale is too large for float16."""
        finite = [torch.isfinite(grid.scale).all(1) for grid in self.grids.values()]
        return torch.stack(finite).all(0).logical_not().tolist()

    def solution(self, index: int, rows: slice, factor: _Factor) -> Solution:
        """Outputs `rows` of matrix `index`, with the inputs in the layer's own order."""
        order = self.order[index]
        groups = torch.stack([order[first] for first in self.grids]) // self.size
        by_group = [list(self.grids.items())[i] for i in torch.argsort(groups).tolist()]
        scale = torch.stack([grid.scale[index, rows] for _, grid in by_group], 1)
        lows = torch.stack([grid.low.expand_as(grid.scale)[index, rows] for _, grid in by_group], 1)
        stored = torch.empty_like(self.codes[index, :, rows], dtype=torch.uint8)
        for group, (first, _) in enumerate(by_group):
            part = slice(first, first + self.size)
            stored[order[part]] = (self.codes[index, part, rows] - lows[:, group]).to(torch.uint8)
        bits = self.scheme.bits
        weight = Affine(
            codes=pack_codes(stored.T.contiguous().cpu(), bits),
            scales=scale.half().cpu(),
            zeros=None if self.scheme.symmetric else (-lows).to(torch.uint8).cpu(),
            bits=bits,
        )
        error = None if factor.fallback else self._output_error(index, rows, factor.added)
        return Solution(weight, error, factor.damping, factor.raised, factor.fallback)

    def _output_error(self, index: int, rows: slice, added: float) -> float:
        sample = slice(rows.start, rows.stop, -(-(rows.stop - rows.start) // _ERROR_ROWS))
        losses = []
        for matrix in (self.errors[index, :, sample], self.weights[index, :, sample]):
            whole = float(((self.hessians[index] @ matrix) * matrix).sum())
            losses.append(max(0.0, whole - added * float(matrix.square().sum())))
        return float((losses[0] / losses[1]) ** 0.5) if losses[1] else 0.0
