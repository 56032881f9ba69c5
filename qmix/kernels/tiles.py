"""Products with packed weights on any device: a tile of rows is dequantized, multiplied and dropped.

Knows weights by `rows` only.
"""

import torch
from torch import Tensor

from qmix.weights.dense import Weight


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
