"""Products with NF4 and Int4 weights on a CPU, straight from their codes.

Where there is no compiler, and in a backward pass, a tile of the weight at a time is decoded and
multiplied by torch. Shape letters: K input features, N output features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qmix.int4 import Int4
from qmix.kernels import int4, nf4, tiles
from qmix.kernels.cpu.library import library
from qmix.weights import NF4, Weight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N]."""
    return linears(x, (weight,))[0]


def linears(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """[..., K] times each of several NF4 or Int4 weights: [..., N] each, in one start of the threads."""
    if x.requires_grad and torch.is_grad_enabled() and library().path is not None:
        return list(_Differentiable.apply(x, tuple(weights)))  # type: ignore[no-untyped-call]
    return pairs([x] * len(weights), weights)


def pairs(xs: Sequence[Tensor], weights: Sequence[Weight]) -> list[Tensor]:
    """Each [..., K] times its NF4 or Int4 weight: [..., N] each, in one start of the threads.

    All in the first one's dtype; without gradients. An act-order weight's activations are permuted, not its
    codes.
    """
    compiled = library()
    if compiled.path is None:
        compiled.fallbacks += len(weights)
        return [_tiles(x, weight) for x, weight in zip(xs, weights, strict=True)]
    floats = {id(x): x.detach().reshape(-1, x.shape[-1]).float().contiguous() for x in xs}
    ordered: list[Tensor] = []
    packed: list[NF4 | Int4] = []
    for x, weight in zip(xs, weights, strict=True):
        assert isinstance(weight, (NF4, Int4))
        tokens = floats[id(x)]
        perm = weight.perm if isinstance(weight, Int4) else None
        ordered.append(tokens if perm is None else tokens.index_select(1, perm))
        packed.append(weight)
    outs = compiled.multiply(ordered, packed, dtype=xs[0].dtype)
    return [out.view(*x.shape[:-1], out.shape[1]) for x, out in zip(xs, outs, strict=True)]


class _Differentiable(torch.autograd.Function):
    """The same products with a gradient for x; the weights have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
        ctx.weights = weights
        return tuple(pairs([x] * len(weights), weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts = [
            tiles.transposed(grad, weight, nf4.TILE_ELEMENTS)
            for grad, weight in zip(grads, ctx.weights, strict=True)
        ]
        return torch.stack(parts).sum(0).to(grads[0].dtype), None


def _tiles(x: Tensor, weight: Weight) -> Tensor:
    row = int4.linear if isinstance(weight, Int4) else nf4.linear
    return row(x, weight)
