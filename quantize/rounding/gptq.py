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
from qmix.quantize.rounding.gptq_choice import group_steps
from qmix.quantize.rounding.gptq_group import GroupOptions
from qmix.quantize.rounding.hessian import Moments
from qmix.quantize.rounding.output_feedback import OutputFeedback
from qmix.quantize.rounding.solver import Solver
from qmix.weights.affine import Affine
from qmix.weights.dense import all_finite
from qmix.weights.scheme import Scheme

_DAMPING_RAISES = 4  # how often the damping is raised tenfold before H is given up
_MIN_SAMPLES = 8  # with fewer inputs H is given up
# Shares of a solve's time on a CPU: the factor; and of the rest, the greedy pass.
_FACTOR_SHARE, _GREEDY_SHARE = 0.15, 0.6


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

    @property
    def of_group(self) -> GroupOptions:
        """What of them a group's steps need."""
        return GroupOptions(self.live_scales, self.scale_search, self.trials)


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
    output_moments: Sequence[Tensor] | None = None,
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
        output_moments: for each weight [N, N], the sum of `g g^T` over the gradients with respect
            to its outputs, see `OutputFeedback`; None: outputs are independent of one another.
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
    problem = _Problem(hessians, lower, scheme, size, options)
    del lower  # 0.8 GB for w2
    tell_rest = partial(_tell_part, tell, _FACTOR_SHARE, 1 - _FACTOR_SHARE)
    if output_moments is None:
        solver = problem.rounded(targets, tell_rest, last=True)
    else:
        solver = problem.rounded_in_turn(targets, OutputFeedback(output_moments), tell_rest)
    _check_scales(solver, where)
    bounds = [0, *accumulate(parts or [weights.shape[1]])]
    return [
        [_solution(solver, index, slice(*rows), order[index], factor) for rows in pairwise(bounds)]
        for index, factor in enumerate(factors)
    ]


class _Problem:
    """Weights of one shape with the sums over their inputs, which several blocks of outputs share.

    Args:
        hessians, lower: [B, K, K], damped, and their Cholesky factors.
        size: inputs of a group.
    """

    def __init__(
        self,
        hessians: Tensor,
        lower: Tensor,
        scheme: Scheme,
        size: int,
        options: RoundingOptions,
    ) -> None:
        self._hessians, self._scheme, self._size = hessians, scheme, size
        self._lower: Tensor | None = lower
        self._steps = group_steps(hessians.device, size, scheme, options.of_group)
        self._refine = options.refine

    def rounded(self, weights: Tensor, tell: Callable[[float], None], *, last: bool) -> Solver:
        """Round weights [B, K, N], each output by itself.

        Args:
            last: nothing is rounded after these weights, so that the factors can go.
        """
        solver, refine = self._solver(weights), self._refine
        assert self._lower is not None
        solver.round_greedily(self._lower, partial(_tell_part, tell, 0, _GREEDY_SHARE))
        if last:
            self._lower = None
        for index in range(refine):
            part = (1 - _GREEDY_SHARE) / refine
            solver.refine(partial(_tell_part, tell, _GREEDY_SHARE + index * part, part))
        return solver

    def rounded_in_turn(
        self, weights: Tensor, feedback: OutputFeedback, tell: Callable[[float], None]
    ) -> Solver:
        """Round weights [B, K, N], each block of outputs for the errors of those before it."""
        targets = feedback.in_order(weights)
        errors, outputs = torch.zeros_like(targets), targets.shape[2]
        solvers: list[Solver] = []
        for rows in feedback.blocks():
            tell_block = partial(
                _tell_part, tell, 1 - rows.stop / outputs, (rows.stop - rows.start) / outputs
            )
            live = targets[:, :, rows] + feedback.correction(errors[:, :, rows.stop :], rows)
            solver = self.rounded(live, tell_block, last=rows.start == 0)
            errors[:, :, rows] = targets[:, :, rows] - (live - solver.errors)
            solvers.insert(0, solver)
        whole = self._solver(weights)
        whole.take(solvers, feedback.order)
        return whole

    def _solver(self, weights: Tensor) -> Solver:
        return Solver(weights, self._hessians, self._scheme, self._size, self._steps)


def _solution(
    solver: Solver, index: int, rows: slice, order: Tensor, factor: "_Factor"
) -> Solution:
    """Outputs `rows` of matrix `index`, with the inputs in the layer's own order."""
    error = None if factor.fallback else solver.output_error(index, rows, factor.added)
    weight = solver.weight(index, rows, order)
    return Solution(weight, error, factor.damping, factor.raised, factor.fallback)


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


def _check_scales(solver: Solver, where: Sequence[str]) -> None:
    for name, overflows in zip(where, solver.scale_overflows(), strict=True):
        if overflows:
            raise CheckpointError(
                "weights too large for float16 scales", where=name, expected="scales below 65504"
            )


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
