"""The oracle: float32 arithmetic on fully dequantized weights, written as plainly as possible.

Shape letters: see qmix.kernels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qmix.kernels.moe import Routes
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert


def linear(x: Tensor, weight: Weight) -> Tensor:
    """`x @ w.dequantize().T` in float32, rounded once to x's dtype."""
    return (x.float() @ weight.dequantize(torch.float32).T).to(x.dtype)


def experts(
    x: Tensor, routes: Routes, weights: Sequence[Expert], act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Every expert on every token, times its routing weight or zero: (T, D) -> (T, D)."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for index, expert in enumerate(weights):
        weight = (routes.weights * (routes.ids == index)).sum(-1, keepdim=True)  # (T, 1)
        hidden = act(linear(x, expert.w1)) * linear(x, expert.w3)
        out = out + weight * linear(hidden, expert.w2).float()
    return out.to(x.dtype)
