"""Matmuls with 4-bit weights on a CPU, straight from their codes.

Where there is no compiler, for many rows of float32 and in a backward pass, torch multiplies one
decoded tile of the weight at a time. Shape letters: see qmix.kernels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qmix.kernels import tiles
from qmix.kernels.cpu.library import DENSE_TOKENS, library
from qmix.kernels.cpu.pointers import takes
from qmix.kernels.gradients import needs_grad
from qmix.kernels.moe import ExpertTokens
from qmix.weights.affine import Affine
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert
from qmix.weights.table import Table

# From so many rows of float32 on torch's own matmul of decoded tiles is faster: 512 rows take 0.56
# (NF4) and 0.82 (Int4) of the time on a core with AVX-512, 2048 rows 0.47 and 0.79. Rows of 16 bits
# are multiplied as integers here, which is twice as fast as that.
_TILED_ROWS = 512


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N]."""
    return linears(x, (weight,))[0]


def linears(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """[..., K] times each of several weights: [..., N] each.

    The threads start once for all of them. Of an act-order weight the activations are permuted.
    """
    compiled = library()
    if compiled.isa is None or not all(map(takes, weights)):
        compiled.fallbacks += len(weights)
        return [tiles.linear(x, weight) for weight in weights]
    if needs_grad(x):
        return list(_Differentiable.apply(x, tuple(weights)))  # type: ignore[no-untyped-call]
    if x.dtype == torch.float32 and x.numel() >= _TILED_ROWS * x.shape[-1]:
        return [tiles.linear(x, weight) for weight in weights]
    return _multiplied(x, weights)


def takes_experts(x: Tensor, experts: Sequence[Expert], through: ExpertTokens) -> bool:
    """Whether `add_experts` takes all of these, and is not slower than `linears`."""
    if x.dtype == torch.float32 and max(through.counts) >= _TILED_ROWS:
        return False
    return all(takes(w) for expert in experts for w in (expert.w1, expert.w2, expert.w3))


def add_experts(x: Tensor, experts: Sequence[Expert], through: ExpertTokens, out: Tensor) -> None:
    """Add `routing_weight * w2(silu(w1 x) * w3 x)` of each 4-bit expert to `out`, in order.

    x is [T, D], out float32 [T, D]. No value between them is rounded to x's dtype, but for what
    comes of SwiGLU where a prompt is bfloat16: see Library.add_experts.
    """
    compiled = library()
    assert compiled.isa is not None
    four_bit = [(_four_bit(e.w1), _four_bit(e.w3), _four_bit(e.w2)) for e in experts]
    compiled.add_experts(
        x.float().contiguous(),
        four_bit,
        through,
        out,
        quantize_activations=x.dtype.itemsize == 2,
        bfloat16_hidden=x.dtype == torch.bfloat16 and len(x) > DENSE_TOKENS,
    )


def _multiplied(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    tokens = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
    four_bit = [_four_bit(weight) for weight in weights]
    perms = [weight.perm if isinstance(weight, Affine) else None for weight in four_bit]
    ordered = [tokens if perm is None else tokens.index_select(1, perm) for perm in perms]
    outs = library().matmul(ordered, four_bit, dtype=x.dtype)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def _four_bit(weight: Weight) -> Table | Affine:
    assert takes(weight)
    return weight


class _Differentiable(torch.autograd.Function):
    """The same matmuls with a gradient for x; the weights have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
        ctx.weights = weights
        return tuple(_multiplied(x, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        parts = [
            tiles.transposed(grad, weight) for grad, weight in zip(grads, ctx.weights, strict=True)
        ]
        return torch.stack(parts).sum(0).to(grads[0].dtype), None
