"""Whether the inner loops of GPTQ are kernels or torch: kernels where a GPU computes them right.

A small problem is rounded both ways on the device before the first use. Shape letters: see
rounding.gptq_group.
"""

import warnings
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from qmix.kernels.backend import named
from qmix.kernels.gpu import probe
from qmix.kernels.trial import Comparison, Draw, first_beyond
from qmix.quantize.rounding.gptq_group import GroupLoops, GroupOptions, GroupSteps
from qmix.quantize.rounding.solver import Solver
from qmix.weights.scheme import Scheme

KERNEL_SIZES = (32, 64, 128)  # of groups; the state of a larger one does not fit the registers
_MATRICES, _OUTPUTS, _GROUPS = 2, 24, 2  # of the problem that is tried


def group_steps(
    device: torch.device, size: int, scheme: Scheme, options: GroupOptions
) -> GroupSteps:
    """What rounds the groups of a matrix on a device.

    The kernels need a GPU and groups of one of KERNEL_SIZES. One warning says if they fail there.

    Args:
        size: inputs of a group.

    Raises:
        UsageError: the environment names no backend.
        ResourceError: the device answers to nothing any more.
    """
    if not _wanted(device) or size not in KERNEL_SIZES:
        return GroupLoops(scheme, options)
    if not _usable(probe.indexed(device), size, scheme, options):
        return GroupLoops(scheme, options)
    from qmix.quantize.rounding.gptq_kernels import GroupKernels

    return GroupKernels(scheme, options, device)


def kernels_of(device: torch.device) -> str | None:
    """Whose kernels round on a device if they are right: they decide the bytes. None: torch's.

    Raises:
        UsageError: the environment names no backend.
    """
    return f"Triton {probe.card(probe.indexed(device)).triton}" if _wanted(device) else None


def _wanted(device: torch.device) -> bool:
    return device.type == "cuda" and named(None) in (None, "qmix")


@cache
def _usable(device: torch.device, size: int, scheme: Scheme, options: GroupOptions) -> bool:
    error = probe.card(device).refusal() or probe.failure(
        device, lambda: first_miss(device, size, scheme, options)
    )
    if error is not None:
        warnings.warn(f"torch rounds instead, and takes longer: {error}", stacklevel=4)
    return error is None


def first_miss(
    device: torch.device, size: int, scheme: Scheme, options: GroupOptions
) -> Comparison | None:
    """The first comparison of kernels and loops that misses the bound; None: all are right."""
    return first_beyond(_comparisons(device, size, scheme, options))


def _comparisons(
    device: torch.device, size: int, scheme: Scheme, options: GroupOptions
) -> Iterator[Comparison]:
    from qmix.quantize.rounding.gptq_kernels import GroupKernels

    draw, inputs = Draw(device), _GROUPS * size
    x = draw.normal(_MATRICES, 4 * inputs, inputs)
    hessians = x.mT @ x + inputs * torch.eye(inputs, device=device)
    weights = draw.normal(_MATRICES, inputs, _OUTPUTS)
    lower = torch.linalg.cholesky(hessians)
    found, wanted = (
        Solver(weights, hessians, scheme, size, steps)
        for steps in (GroupKernels(scheme, options, device), GroupLoops(scheme, options))
    )
    for what in ("rounding", "refining"):
        for solver in (found, wanted):
            if what == "rounding":
                solver.round_greedily(lower, lambda _: None)
            else:
                solver.refine(lambda _: None)
        # Sums in another order may round a value between two codes otherwise.
        same = (found.codes == wanted.codes).float().mean(dim=(1, 2))
        yield Comparison(f"codes after {what} groups of {size}", same, torch.ones_like(same))
        yield Comparison(f"loss after {what} groups of {size}", _loss(found), _loss(wanted))


def _loss(solver: Solver) -> Tensor:
    """`tr E^T H E` [B]."""
    return ((solver.hessians @ solver.errors) * solver.errors).sum((1, 2))
