"""Products with weights that are stored as they are: torch's own matmul."""

from torch import Tensor
from torch.nn import functional as F

from qmix.weights import Dense, Weight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N]; differentiable in both arguments."""
    assert isinstance(weight, Dense)
    return F.linear(x, weight.data)
