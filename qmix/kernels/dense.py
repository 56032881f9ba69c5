"""Matmuls with 16-bit and 32-bit weights, and norms: torch's own operations.

A few tokens in bfloat16 on a CPU go through the compiled kernels, where there are any. There torch
takes 1.7 times as long for a matmul of one (16 ms instead of 9 for an lm_head of 262 MB), and seven
operations for a norm; and its sums depend on how many tokens there are.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.kernels import pointwise
from qmix.kernels.cpu.library import DENSE_TOKENS, library
from qmix.kernels.gradients import needs_grad
from qmix.weights.dense import Dense, Weight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N]; differentiable in both arguments."""
    assert isinstance(weight, Dense)
    data = weight.data
    if _few(x, data):
        tokens = x.detach().reshape(-1, data.shape[1]).contiguous()
        return library().matmul_dense(tokens, data.detach()).view(*x.shape[:-1], len(data))
    return F.linear(x, data)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See pointwise.rms_norm: [..., D]."""
    if _few(x, weight) and x.is_contiguous():
        return library().rms_norm(x.detach(), weight.detach(), eps)
    return pointwise.rms_norm(x, weight, eps)


def _few(x: Tensor, data: Tensor) -> bool:
    """Whether the compiled kernels take x [..., K] and a weight [..., K]."""
    return (
        x.is_cpu
        and 0 < x.numel() <= DENSE_TOKENS * data.shape[-1]
        and x.dtype == data.dtype == torch.bfloat16
        and data.is_contiguous()
        and not needs_grad(x, data)
        and library().isa is not None
    )
