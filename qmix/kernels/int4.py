"""Products with Int4 and Int8 weights."""

from dataclasses import replace

from torch import Tensor

from qmix.kernels import tiles
from qmix.weights.dense import Weight
from qmix.weights.integers import Integers

TILE_ELEMENTS = 512 * 1024  # as for NF4: 2 MiB of float32


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N], a tile of the weight at a time.

    An act-order weight stays in its stored order: the activations are permuted, which are fewer.
    """
    assert isinstance(weight, Integers)
    if weight.perm is not None:
        x, weight = x.index_select(-1, weight.perm), replace(weight, perm=None)
    return tiles.linear(x, weight, TILE_ELEMENTS)
