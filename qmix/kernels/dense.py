"""Products with weights that are stored as they are: torch's own matmul.

But one or two tokens in bfloat16 on a CPU go through the compiled products, where there are any: torch takes
1.7 times as long for a row of them (16 ms instead of 9 for an lm_head of 262 MB).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.kernels.cpu.library import DENSE_TOKENS, library
from qmix.weights import Dense, Weight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N]; differentiable in both arguments."""
    assert isinstance(weight, Dense)
    data = weight.data
    if x.is_cpu and 0 < x.numel() <= DENSE_TOKENS * data.shape[1] and _plain(x, data):
        tokens = x.detach().reshape(-1, data.shape[1]).contiguous()
        return library().multiply_dense(tokens, data.detach()).view(*x.shape[:-1], len(data))
    return F.linear(x, data)


def _plain(x: Tensor, data: Tensor) -> bool:
    """Whether the compiled products may be taken."""
    trained = torch.is_grad_enabled() and (x.requires_grad or data.requires_grad)
    return (
        x.dtype == data.dtype == torch.bfloat16
        and data.is_contiguous()
        and not trained
        and library().path is not None
    )
