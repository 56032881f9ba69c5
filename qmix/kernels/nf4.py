"""Products with NF4 weights."""

from torch import Tensor

from qmix.kernels import tiles
from qmix.weights import NF4, Weight

# 2 MiB of float32 stay in a core's share of the last-level cache; larger tiles were not faster on a
# 2-core Zen 3, smaller ones pay torch's call overhead.
TILE_ELEMENTS = 512 * 1024


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N], a tile of the weight at a time."""
    assert isinstance(weight, NF4)
    return tiles.linear(x, weight, TILE_ELEMENTS)
