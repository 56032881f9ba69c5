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
