"""One table: (weight type, device) -> the function that multiplies. Reference rows first.

A kernel may only be faster than `x @ w.dequantize().T`; it may not mean anything else. Knows
nothing of models, files or tiers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.errors import UnsupportedError, UsageError
from qmix.fp4 import FP4
from qmix.int4 import Int4
from qmix.int8 import Int8
from qmix.kernels import dense, int4, nf4, reference
from qmix.kernels.attention import attend, visible
from qmix.kernels.experts import Expert, Routes, routed
from qmix.kernels.gpu import packed
from qmix.kernels.gpu.packed import Packed, PackedExperts
from qmix.kernels.pointwise import apply_rotary, rms_norm, rotary, route
from qmix.weights import NF4, Dense, Weight

__all__ = [
    "Expert",
    "Packed",
    "PackedExperts",
    "Routes",
    "apply_rotary",
    "attend",
    "experts",
    "linear",
    "overridden",
    "override",
    "rms_norm",
    "rotary",
    "route",
    "visible",
]

Choice = Literal["reference"]
Linear = Callable[[Tensor, Weight], Tensor]

# The fast rows. A device without a row of its own takes the reference row's arithmetic in tiles.
_LINEAR: Mapping[tuple[type, str], Linear] = {
    (Dense, "cpu"): dense.linear,
    (Dense, "cuda"): dense.linear,
    (NF4, "cpu"): nf4.linear,
    (NF4, "cuda"): nf4.linear,
    (FP4, "cpu"): nf4.linear,
    (FP4, "cuda"): nf4.linear,
    (Int4, "cpu"): int4.linear,
    (Int4, "cuda"): int4.linear,
    (Int8, "cpu"): int4.linear,
    (Int8, "cuda"): int4.linear,
    (Packed, "cuda"): packed.linear,
}

_choice: ContextVar[Choice | None] = ContextVar("kernel override", default=None)


@contextmanager
def override(choice: Choice) -> Iterator[None]:
    """Within the block every product takes the named row: `reference` is the oracle."""
    if choice != "reference":
        raise UsageError("no such kernel row", expected="'reference'", found=repr(choice))
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def overridden() -> bool:
    """Whether products take another row than their device's."""
    return _choice.get() is not None


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight.T`: [..., K] times [N, K] gives [..., N] in x's dtype."""
    assert x.shape[-1] == weight.shape[1], (tuple(x.shape), weight.shape)
    if _choice.get() == "reference":
        return reference.linear(x, weight)
    row = _LINEAR.get((type(weight), x.device.type))
    if row is None:
        raise UnsupportedError(
            f"no kernel multiplies {type(weight).__name__} on {x.device.type}",
            expected=", ".join(f"{kind.__name__} on {device}" for kind, device in _LINEAR),
        )
    return row(x, weight)


def experts(
    x: Tensor, routes: Routes, weights: Sequence[Expert], act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Each token through its chosen experts: [T, D] -> [T, D], summed in float32.

    Experts that no token chose are not touched.
    """
    if _choice.get() == "reference":
        return reference.experts(x, routes, weights, act)
    trained = x.requires_grad and torch.is_grad_enabled()
    if isinstance(weights, PackedExperts) and act is F.silu and not trained:
        return packed.experts(x, routes, weights)
    return routed(x, routes, weights, act, linear)
