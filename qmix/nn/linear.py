"""A linear layer over a weight of any kind, and the norm.

Knows no bits: a weight is multiplied by qmix.kernels. Shape letters: see qmix.nn.
"""

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.nn.stored import StoredModule
from qmix.weights.dense import Weight


class Linear(StoredModule):
    """A bias-free linear layer over any Weight: a trainable parameter when dense."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def store(self, weight: Weight) -> None:
        """Replace the weight; the shape [out_features, in_features] must stay."""
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        super().store(weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return kernels.linear(x, self.stored)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.stored.scheme}"


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return kernels.rms_norm(x, self.weight, self.eps)


def is_observed(module: nn.Module) -> bool:
    """Whether a caller has to see each call of the module: hooks, or a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or "forward" in module.__dict__


def initialise(module: nn.Module, config: MixtralConfig) -> None:
    """Fill linear and embedding weights from N(0, initializer_range), norms with ones.

    The embedding of pad_token_id is zero. Parameters on the meta device stay as they are.
    """
    pad = config.pad_token_id
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, config.initializer_range)
            if (
                name.endswith("embed_tokens.weight")
                and pad is not None
                and 0 <= pad < len(parameter)
            ):
                parameter[pad] = 0.0
