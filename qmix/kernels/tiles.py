"""Matmuls with quantized weights on any device: a tile of rows is dequantized, multiplied, dropped.

Shape letters: see qmix.kernels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qmix.kernels.gradients import needs_grad
from qmix.weights.affine import Affine
from qmix.weights.dense import Weight

# 8 MiB of float32. On 2 cores one token times a 14336 x 4096 weight takes 51 ms with such tiles, 61
# ms with 2 MiB, 81 ms with 512 KiB and 76 ms with 64 MiB; 64 tokens take 104, 107, 152 and 120 ms.
TABLE_TILE_ELEMENTS = 2048 * 1024
AFFINE_TILE_ELEMENTS = 512 * 1024  # 2 MiB of float32


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N]. On the CPU only one dequantized tile of the weight exists at a time.

    On the CPU a tile is float32 whatever the dtype of x: float32 matmuls are faster than emulated
    bfloat16 ones, and closer to the oracle. An act-order weight keeps its stored order; the
    activations are permuted, which are smaller.
    """
    tile_elements = TABLE_TILE_ELEMENTS  # the most of a tile; a tile of one row may be larger
    if isinstance(weight, Affine):
        tile_elements = AFFINE_TILE_ELEMENTS
        if weight.perm is not None:
            x, weight = x.index_select(-1, weight.perm), replace(weight, perm=None)
    out_features, in_features = weight.shape
    on_cpu = x.device.type == "cpu"
    compute = torch.float32 if on_cpu else x.dtype
    tokens = x.reshape(-1, in_features).to(compute)
    step = max(1, tile_elements // in_features) if on_cpu else out_features
    starts = range(0, out_features, step)
    tiles = (weight.rows(start, min(start + step, out_features), compute) for start in starts)
    if needs_grad(tokens):
        out = torch.cat([tokens @ tile.T for tile in tiles], 1)  # autograd keeps every tile
    else:
        out = torch.empty(tokens.shape[0], out_features, dtype=compute, device=x.device)
        for start, tile in zip(starts, tiles, strict=True):
            torch.mm(tokens, tile.T, out=out[:, start : start + step])
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def transposed(x: Tensor, weight: Weight) -> Tensor:
    """`x @ weight`, not `x @ weight.T`: [..., N] -> float32 [..., K], a tile at a time."""
    out_features, in_features = weight.shape
    rows = x.reshape(-1, out_features).float()
    out = torch.zeros(rows.shape[0], in_features, device=x.device)
    step = max(1, TABLE_TILE_ELEMENTS // in_features)
    for start in range(0, out_features, step):
        tile = weight.rows(start, min(start + step, out_features), torch.float32)
        out.addmm_(rows[:, start : start + step], tile)
    return out.view(*x.shape[:-1], in_features)
