"""Products with NF4 weights."""

from torch import Tensor

from qmix.kernels import tiles
from qmix.weights.dense import Weight
from qmix.weights.nf4 import NF4

# 8 MiB of float32. On 2 cores a 14336 x 4096 product of one row takes 51 ms with such tiles, 61 with
# 2 MiB, 81 with 512 KiB and 76 with 64 MiB; of 64 rows 104, 107, 152 and 120.
TILE_ELEMENTS = 2048 * 1024


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N], a tile of the weight at a time."""
    assert isinstance(weight, NF4)
    return tiles.linear(x, weight, TILE_ELEMENTS)
