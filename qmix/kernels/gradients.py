"""Whether autograd is recording: kernels without a backward pass ask before they take a call."""

import torch
from torch import Tensor


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd records an operation on any of these tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
