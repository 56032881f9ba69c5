"""Products with 4-bit weights on any device: a tile of rows is dequantized, multiplied and dropped.

Shape letters: N outputs, K inputs.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qmix.weights.dense import Weight
from qmix.weights.integers import Integers
from qmix.weights.nf4 import NF4

# 8 MiB of float32. On 2 cores a 14336 x 4096 product of one row takes 51 ms with such tiles, 61 with
# 2 MiB, 81 with 512 KiB and 76 with 64 MiB; of 64 rows 104, 107, 152 and 120.
NF4_TILE_ELEMENTS = 2048 * 1024
INTEGER_TILE_ELEMENTS = 512 * 1024  # 2 MiB of float32


def nf4(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N] with an NF4 or FP4 weight."""
    assert isinstance(weight, NF4)
    return linear(x, weight, NF4_TILE_ELEMENTS)


def integers(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N] with an Int4 or Int8 weight.

    An act-order weight stays in its stored order: the activations are permuted, which are fewer.
    """
    assert isinstance(weight, Integers)
    if weight.perm is not None:
        x, weight = x.index_select(-1, weight.perm), replace(weight, perm=None)
    return linear(x, weight, INTEGER_TILE_ELEMENTS)


def linear(x: Tensor, weight: Weight, tile_elements: int) -> Tensor:
    """[..., K] -> [..., N], on the CPU never holding more than one dequantized tile of the weight.

    There the tile is float32 whatever x's dtype: float32 products are faster than emulated
    bfloat16 ones, and closer to the oracle.

    Args:
        tile_elements: upper bound of a tile, but for a tile of one row.
    """
    out_features, in_features = weight.shape
    on_cpu = x.device.type == "cpu"
    compute = torch.float32 if on_cpu else x.dtype
    tokens = x.reshape(-1, in_features).to(compute)
    step = max(1, tile_elements // in_features) if on_cpu else out_features
    starts = range(0, out_features, step)
    tiles = (weight.rows(start, min(start + step, out_features), compute) for start in starts)
    if tokens.requires_grad and torch.is_grad_enabled():
        out = torch.cat([tokens @ tile.T for tile in tiles], 1)  # autograd keeps every tile
    else:
        out = torch.empty(tokens.shape[0], out_features, dtype=compute, device=x.device)
        for start, tile in zip(starts, tiles, strict=True):
            torch.mm(tokens, tile.T, out=out[:, start : start + step])
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def transposed(x: Tensor, weight: Weight, tile_elements: int) -> Tensor:
    """x [..., N] times the weight itself, not its transpose: float32 [..., K], a tile at a time."""
    out_features, in_features = weight.shape
    rows = x.reshape(-1, out_features).float()
    out = torch.zeros(rows.shape[0], in_features, device=x.device)
    step = max(1, tile_elements // in_features)
    for start in range(0, out_features, step):
        tile = weight.rows(start, min(start + step, out_features), torch.float32)
        out.addmm_(rows[:, start : start + step], tile)
    return out.view(*x.shape[:-1], in_features)
