"""The inner loops of GPTQ: rounding a group of inputs, and a pass of coordinate descent over it.

Shape letters: B matrices at once, N outputs, n outputs of a slab, g inputs of a group, R trials.
Knows nothing of the order of groups or of the matrix around them.
"""

import torch
from torch import Tensor

from qmix.quantize.rounding.grid import Grid

_BLOCK = 32  # inputs rounded one by one before one matmul updates the rest of their group
_TRIAL_SPAN = 0.05  # of scales around the best; 0.2 gains a tenth less, 0.02 a third less
# Weights in one slab of trials. 4 MiB of float32 stay in a CPU's cache; a GPU prefers few launches.
_TRIAL_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 28}


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
    factors = torch.ones(1, device=device)
    if trials > 1:
        factors = 1 + torch.linspace(-_TRIAL_SPAN, _TRIAL_SPAN, trials, device=device)
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


def _round_slab(
    weights: Tensor, targets: Tensor, grid: Grid, lower: Tensor, factors: Tensor
) -> tuple[Tensor, Grid]:
    """Round a group once a trial and return the codes [B, g, n] and the grid of the least loss.

    Args:
        weights, targets: [B, g, n].
        lower: [B, g, g].
        factors: [R], by which the trials multiply the scales.
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
            residual = (targets[:, :, k] - value).mul_(pivots[:, k, None])
            loss.addcmul_(residual, residual)
            torch.sub(weights[:, k], value, out=errors[:, :, k])
            if k > start:
                ratios = lower[:, k, start:k] / pivots[:, start:k]
                targets[:, :, start:k].addcmul_(ratios[..., None], errors[:, :, k, None])
        if start:
            ratios = lower[:, start:stop, :start].mT / pivots[:, :start, None]
            targets[:, :, :start] += ratios @ errors[:, :, start:stop]
    best = loss.argmin(0, keepdim=True)  # [1, B, n]
    best_codes = codes.gather(0, best[:, :, None].expand(1, *codes.shape[1:]))[0]
    return best_codes, grid.rescaled(tried.scale.gather(0, best)[0])


def descend(errors: Tensor, codes: Tensor, gradient: Tensor, hessian: Tensor, grid: Grid) -> None:
    """Move each code of a group to its optimum while the others stay fixed.

    Args:
        errors: [B, g, N]; overwritten.
        codes: [B, g, N]; updated in place.
        gradient: [B, g, N], H times all errors of the matrix; overwritten.
        hessian: [B, g, g], the group's block of H.
    """
    size = codes.shape[1]
    curvature = hessian.diagonal(dim1=1, dim2=2)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        for k in range(start, stop):
            value = codes[:, k] * grid.scale
            best = grid.nearest(value + gradient[:, k] / curvature[:, k, None])
            codes[:, k] = best
            # From here on `errors` holds by how much this error changed.
            torch.sub(value, best.mul_(grid.scale), out=errors[:, k])
            if k + 1 < stop:
                row = hessian[:, k, k + 1 : stop, None]
                gradient[:, k + 1 : stop].addcmul_(row, errors[:, k, None])
        if stop < size:
            gradient[:, stop:] += hessian[:, stop:, start:stop] @ errors[:, start:stop]
