"""Whether our kernels run on a GPU and compute what torch computes; once a process and device.

Asked before weights are packed, so that what fails is not found in the middle of an answer. Knows
no checkpoint: which kinds of weights are tried is handed in.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache

import torch

from qmix.errors import ResourceError, UnsupportedError
from qmix.kernels.gpu.card import Card
from qmix.kernels.gpu.current_device import on
from qmix.kernels.trial import Comparison
from qmix.weights.scheme import Scheme


def why_not(
    device: torch.device, dtype: torch.dtype, schemes: Iterable[Scheme] = ()
) -> UnsupportedError | None:
    """Why our kernels are not to be used on a CUDA device; None: they are right there.

    Args:
        dtype: of activations.
        schemes: of the weights that are to be multiplied.

    Raises:
        ResourceError: the device answers to nothing any more.
    """
    device = indexed(device)
    error = card(device).refusal() or _failure(device, dtype, None)
    for scheme in schemes:
        error = error or _failure(device, dtype, scheme)
    return error


def indexed(device: torch.device) -> torch.device:
    """A CUDA device with its index; without one it is the current device."""
    index: int | None = device.index
    return device if index is not None else torch.device(device.type, torch.cuda.current_device())


@cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels that read no weights are right; one warning if they are not."""
    error = why_not(device, dtype)
    if error is not None:
        warnings.warn(f"torch computes instead: {error}", RuntimeWarning, stacklevel=3)
    return error is None


@cache
def card(device: torch.device) -> Card:
    """What was seen of a CUDA device, which has an index."""
    return Card.gather(device)


@cache
def _failure(
    device: torch.device, dtype: torch.dtype, scheme: Scheme | None
) -> UnsupportedError | None:
    """Why the kernels fail on weights of one scheme; None for the kernels without weights."""

    def first_miss() -> Comparison | None:
        from qmix.kernels.gpu import self_check

        return self_check.first_miss(device, dtype, scheme)

    return failure(device, first_miss)


def failure(
    device: torch.device, first_miss: Callable[[], Comparison | None]
) -> UnsupportedError | None:
    """Why a trial of kernels fails on a CUDA device; None: they are right.

    Args:
        device: with an index.
        first_miss: tries them, and returns the first comparison that misses the bound.

    Raises:
        ResourceError: the device answers to nothing any more.
    """
    try:
        with torch.no_grad(), on(device):
            miss = first_miss()
            torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001 - whatever a compiler, a driver or a launch may raise
        if not _answers(device):
            raise ResourceError(
                "the GPU does not answer since the kernels were tried",
                where=card(device).name,
                found=f"{type(error).__name__}: {error}".splitlines()[0][:200],
                remedy="Start again with QMIX_BACKEND=torch, and report it.",
            ) from None
        return card(device).explained(error)
    if miss is None:
        return None
    return UnsupportedError(
        f"the kernels compute wrong results: {miss.what}",
        where=card(device).name,
        expected="torch's result",
        found=f"an error of {miss.error:.1%} of its largest value, {card(device).versions}",
        remedy="Report it, with the output of qmix doctor.",
    )


def _answers(device: torch.device) -> bool:
    """Whether torch itself still computes on the device: after some errors nothing does."""
    try:
        return torch.zeros(1, device=device).add_(1).item() == 1
    except RuntimeError:
        return False
