"""Matmuls by the bitsandbytes package, for the weights of its own formats: NF4 and FP4.

It runs on GPUs that are too old for our kernels, on AMD's and on the CPU. Its import takes seconds
and happens with the first question. Shape letters: see qmix.kernels.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qmix.errors import QmixError, UnsupportedError
from qmix.kernels.trial import TOKENS, Comparison, Draw, first_beyond, inputs_of, weight_of
from qmix.weights.dense import Weight
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import Scheme
from qmix.weights.table import VALUES, Table

KINDS = ("nf4", "fp4")
_BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCK = 256


@cache
def package() -> Any:
    """The package.

    Raises:
        UnsupportedError: it is not installed, or cannot be loaded.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(
            "bitsandbytes cannot be used",
            found=f"{type(error).__name__}: {error}"[:200],
            remedy="Run: pip install bitsandbytes",
        ) from None
    return bitsandbytes


def why_not(
    device: torch.device, dtype: torch.dtype, schemes: Iterable[Scheme]
) -> UnsupportedError | None:
    """Why the package is of no use for such weights on a device; None: it is.

    Args:
        dtype: of activations.
        schemes: of all weights that are to be multiplied; torch multiplies what the package does
            not take.
    """
    schemes = tuple(schemes)
    taken = [scheme for scheme in schemes if scheme.kind in KINDS]
    if not taken:
        return UnsupportedError(
            "bitsandbytes does not multiply such weights",
            where="backend",
            expected="NF4 or FP4",
            found=", ".join(sorted(map(str, schemes))) or "no quantized weights",
        )
    errors = (_failure(device, dtype, scheme) for scheme in taken)
    return next((error for error in errors if error is not None), None)


@cache
def _failure(device: torch.device, dtype: torch.dtype, scheme: Scheme) -> UnsupportedError | None:
    """Why the package fails on weights of one scheme."""
    try:
        with torch.no_grad():
            miss = first_beyond(_matmuls(Draw(device), dtype, scheme))
    except QmixError as error:
        return UnsupportedError(error.what, found=error.found, remedy=error.remedy)
    except Exception as error:  # noqa: BLE001 - whatever the package's libraries may raise
        found = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return UnsupportedError("bitsandbytes fails", where=str(device), found=found)
    if miss is None:
        return None
    return UnsupportedError(
        f"bitsandbytes computes wrong results: {miss.what}",
        where=str(device),
        expected="torch's result",
        found=f"an error of {miss.error:.1%} of its largest value, {package().__version__}",
        remedy="Install another version of it.",
    )


def _matmuls(draw: Draw, dtype: torch.dtype, scheme: Scheme) -> Iterator[Comparison]:
    weight = weight_of(scheme, (256, inputs_of(scheme)), draw)
    assert isinstance(weight, Table)
    if not takes(weight):
        return  # torch multiplies it
    dense = weight.dequantize(torch.float32)
    for tokens in TOKENS:
        x = draw.normal(tokens, weight.shape[1], dtype=dtype)
        what = f"matmul of {tokens} tokens and {scheme}"
        yield Comparison(what, linear(x, weight), x.float() @ dense.T)


def takes(weight: Weight) -> bool:
    """Whether the package multiplies the weight.

    Its products are wrong where a block belongs to two rows (0.50.2, on the CPU).
    """
    return isinstance(weight, Table) and _states.of(weight) is not None


def linear(x: Tensor, weight: Table) -> Tensor:
    """[..., K] -> [..., N] in x's dtype; differentiable in x."""
    state = _states.of(weight)
    assert state is not None
    product: Tensor = package().matmul_4bit(x, weight.codes.view(-1, 1).t(), quant_state=state)
    return product


class _States:
    """The package's descriptions of weights, each as long as its weight lives."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[Table, Any] = WeakKeyDictionary()

    def of(self, weight: Table) -> Any:
        """The description of a weight; None if the package does not take it."""
        try:
            return self._made[weight]
        except KeyError:
            state = self._made[weight] = _state(weight) if _usual(weight) else None
            return state


_states = _States()


def _usual(weight: Table) -> bool:
    scales = weight.scales
    return (
        weight.kind in KINDS
        and weight.high_first
        and weight.block_size in _BLOCK_SIZES
        and weight.shape[1] % weight.block_size == 0
        and weight.table.tolist() == list(VALUES[weight.kind])
        and (
            scales.bits == 8 and scales.block == _NESTED_BLOCK
            if isinstance(scales, NestedScales)
            else scales.dtype == torch.float32
        )
    )


def _state(weight: Table) -> Any:
    new = package().functional.QuantState
    scales = weight.scales
    common: dict[str, object] = {"blocksize": weight.block_size, "quant_type": weight.kind}
    common |= {"shape": torch.Size(weight.shape), "code": weight.table, "dtype": weight.dtype}
    if not isinstance(scales, NestedScales):
        return new(absmax=scales, **common)
    outer = new(absmax=scales.outer, code=scales.map, blocksize=scales.block, dtype=torch.float32)
    offset = torch.tensor(scales.offset, device=weight.device)
    return new(absmax=scales.codes, offset=offset, state2=outer, **common)
