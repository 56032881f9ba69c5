"""Attention of single tokens in bfloat16 on a CPU: what the compiled one takes.

Shape letters: B batch, H query heads, G key-value heads, L keys, d head width.
"""

import torch
from torch import Tensor

from qmix.kernels.cpu.library import library


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled attention takes these, each query seeing all keys."""
    batch, groups, positions, width = k.shape
    return (
        q.is_cpu
        and q.shape[2] == 1
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and k.stride() == v.stride()
        and k.stride(3) == 1
        and (positions == 1 or k.stride(2) == width)
        and (batch == 1 or k.stride(0) == groups * k.stride(1))
        and library().path is not None
    )
