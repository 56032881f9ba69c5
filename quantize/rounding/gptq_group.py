"""The inner loops of GPTQ: rounding a group of inputs, and a pass of coordinate descent over it.

`GroupLoops` does both in torch. On a GPU they are kernels (gptq_kernels), for which the loops are
the oracle. Shape letters: B matrices at once, N outputs, n outputs of a slab, K inputs, g inputs of
a group, R trials. Knows nothing of the order of groups.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qmix.quantize.rounding.grid import Grid, absmax_grid, search_grid
from qmix.weights.scheme import Scheme

_BLOCK = 32  # inputs rounded one by one before one matmul updates the rest of their group
_TRIAL_SPAN = 0.05  # of scales around the best; 0.2 gains a tenth less, 0.02 a third less
# Weights in one slab of trials. 4 MiB of float32 stay in a CPU's cache; a GPU prefers few launches.
_TRIAL_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}


@dataclass(frozen=True, eq=False)
class Group:
    """Views [B, g, N] of the inputs of a group: what is rounded, and what became of it.

    Attributes:
        codes: int16. errors: weights minus rounded weights. Both are overwritten.
    """

    weights: Tensor
    codes: Tensor
    errors: Tensor

    def keep(self, codes: Tensor, scale: Tensor) -> None:
        """Keep codes [B, g, N], as floats, and the errors that they make with a scale [B, N]."""
        self.codes.copy_(codes)
        torch.sub(self.weights, codes * scale[:, None], out=self.errors)


class GroupSteps(Protocol):
    """What a solve does with one group of inputs of all outputs."""

    def product(self, factors: Tensor, errors: Tensor, first: int) -> Tensor:
        """`factors^T errors` [B, g, N] over the inputs from `first` on.

        Args:
            factors: [B, K, g].
            errors: [B, K, N], zeros before `first`.
        """

    def round(self, group: Group, carried: Tensor, lower: Tensor) -> Grid:
        """Choose the group's grid and round its inputs, starting with the last one.

        Args:
            carried: [B, g, N], what the errors of later groups weigh here; overwritten.
            lower: [B, g, g], the group's block of the Cholesky factor of H.
        """

    def refine(self, group: Group, gradient: Tensor, hessian: Tensor, grid: Grid) -> Grid:
        """Move the scales to their optimum, then each code, all else fixed.

        Args:
            gradient: [B, g, N], H times all errors of the matrix; overwritten.
            hessian: [B, g, g], the group's block of H.

        Returns:
            The new grid.
        """


@dataclass(frozen=True)
class GroupOptions:
    """How a group is rounded; see `gptq.RoundingOptions`."""

    live_scales: bool
    scale_search: bool
    trials: int


class GroupLoops:
    """`GroupSteps` in torch, input by input."""

    def __init__(self, scheme: Scheme, options: GroupOptions) -> None:
        self._scheme, self._options = scheme, options

    def product(self, factors: Tensor, errors: Tensor, first: int) -> Tensor:
        """See `GroupSteps`."""
        return factors[:, first:].mT @ errors[:, first:]

    def round(self, group: Group, carried: Tensor, lower: Tensor) -> Grid:
        """See `GroupSteps`."""
        pivots = lower.diagonal(dim1=1, dim2=2)[:, :, None]
        live = group.weights
        if self._options.live_scales:
            live = live + torch.linalg.solve_triangular(lower.mT, carried, upper=True)
        grid = (
            search_grid(live, pivots.square(), self._scheme)
            if self._options.scale_search
            else absmax_grid(live, self._scheme)
        )
        targets = carried.div_(pivots).add_(group.weights)
        codes, grid = round_group(group.weights, targets, grid, lower, self._options.trials)
        group.keep(codes, grid.scale)
        return grid

    def refine(self, group: Group, gradient: Tensor, hessian: Tensor, grid: Grid) -> Grid:
        """See `GroupSteps`."""
        codes = group.codes.float()
        hessian_codes = hessian @ codes
        curvature = (hessian_codes * codes).sum(1)
        change = (gradient * codes).sum(1) / curvature
        better = grid.rescaled(grid.scale + torch.where(curvature > 0, change, 0))
        moved = (better.scale - grid.scale)[:, None]
        gradient.addcmul_(hessian_codes, moved, value=-1)
        group.keep(descend(codes, gradient, hessian, better), better.scale)
        return better


def round_group(
    weights: Tensor, targets: Tensor, grid: Grid, lower: Tensor, trials: int
) -> tuple[Tensor, Grid]:
    """Round one group with several scales close to the grid's, and keep the best for each output.

    Args:
        weights: [B, g, N].
        targets: [B, g, N], the weights plus what compensates the errors made so far.
        lower: [B, g, g], the group's block of the Cholesky factor.
        trials: number of scales to try; 1 keeps the grid as it is.

    Returns:
        The codes [B, g, N], and the grid with the scales that were kept.
    """
    device, outputs = weights.device, weights.shape[2]
    factors = trial_factors(trials, device)
    step = max(1, _TRIAL_ELEMENTS[device.type] // (weights[:, :, 0].numel() * trials))
    codes, grids = [], []
    for start in range(0, outputs, step):
        slab = slice(start, min(start + step, outputs))
        slab_codes, slab_grid = _round_slab(
            weights[..., slab], targets[..., slab], grid.outputs(slab), lower, factors
        )
        codes.append(slab_codes)
        grids.append(slab_grid)
    return torch.cat(codes, 2), Grid.concatenated(grids)


def trial_factors(trials: int, device: torch.device) -> Tensor:
    """By which the trials multiply a scale: [R], in ascending order."""
    if trials == 1:
        return torch.ones(1, device=device)
    return 1 + torch.linspace(-_TRIAL_SPAN, _TRIAL_SPAN, trials, device=device)


def _round_slab(
    weights: Tensor, targets: Tensor, grid: Grid, lower: Tensor, factors: Tensor
) -> tuple[Tensor, Grid]:
    """Round a group once a trial and return the codes [B, g, n] and the grid of the least loss.

    Args:
        weights, targets: [B, g, n].
        lower: [B, g, g].
        factors: [R], by which the trials multiply the scales.
    """
    count, size, outputs = weights.shape
    pivots = lower.diagonal(dim1=1, dim2=2)  # [B, g]
    tried = grid.outputs_repeated(len(factors)).scaled(factors.repeat_interleave(outputs))
    # In units of the scale, and with inputs first: one input of all outputs is then contiguous.
    units = [each.transpose(0, 1).repeat(1, 1, len(factors)) for each in (targets, weights)]
    residuals, errors = (each.div_(tried.scale) for each in units)
    codes = torch.empty_like(residuals)
    loss = torch.zeros_like(tried.scale)
    for stop in range(size, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        ratios = (lower[:, start:stop, :stop] / pivots[:, None, :stop]).transpose(0, 1)
        for k in range(stop - 1, start - 1, -1):
            code = torch.round(residuals[k], out=codes[k]).clamp_(tried.low, tried.high)
            errors[k] -= code
            residuals[k] -= code
            if k > start:
                row = ratios[k - start, :, start:k].T
                residuals[start:k].addcmul_(row[:, :, None], errors[k])
        loss += (residuals[start:stop] * pivots[:, start:stop].T[:, :, None]).square_().sum(0)
        if start:
            carried = ratios[:, :, :start].permute(1, 2, 0) @ errors[start:stop].transpose(0, 1)
            residuals[:start] += carried.transpose(0, 1)
    loss *= tried.scale.square()
    best = loss.view(count, len(factors), outputs).argmin(1)
    chosen = best * outputs + torch.arange(outputs, device=best.device)  # [B, n]
    best_codes = codes.gather(2, chosen.expand(size, count, outputs))
    return best_codes.transpose(0, 1), grid.rescaled(tried.scale.gather(1, chosen))


def descend(codes: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """Move each code of a group to its optimum while the others stay fixed.

    Args:
        codes: [B, g, N], as floats.
        gradient: [B, g, N], H times all errors of the matrix.
        hessian: [B, g, g], the group's block of H.

    Returns:
        The new codes [B, g, N].
    """
    size = codes.shape[1]
    # In units of the scale, and with inputs first, as in `_round_slab`.
    gradient = gradient.transpose(0, 1) / grid.scale
    codes = codes.transpose(0, 1).contiguous()
    changes = torch.empty_like(codes)
    inverse = hessian.diagonal(dim1=1, dim2=2).reciprocal().T[:, :, None]  # [g, B, 1]
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        for k in range(start, stop):
            best = torch.addcmul(codes[k], gradient[k], inverse[k])
            best = best.round_().clamp_(grid.low, grid.high)
            torch.sub(codes[k], best, out=changes[k])
            codes[k] = best
            if k + 1 < stop:
                row = hessian[:, k, k + 1 : stop].T
                gradient[k + 1 : stop].addcmul_(row[:, :, None], changes[k])
        if stop < size:
            carried = hessian[:, stop:, start:stop] @ changes[start:stop].transpose(0, 1)
            gradient[stop:] += carried.transpose(0, 1)
    return codes.transpose(0, 1)
