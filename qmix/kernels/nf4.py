"""Products with NF4 weights: one tile of rows is dequantized at a time, multiplied and dropped."""

import torch
from torch import Tensor

from qmix.weights import NF4, Weight

# 2 MiB of float32 stay in a core's share of the last-level cache; larger tiles were not faster on a
# 2-core Zen 3, smaller ones pay torch's call overhead.
TILE_ELEMENTS = 512 * 1024


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N], never holding more than one dequantized tile of the weight.

    On the CPU the tile is float32 whatever x's dtype: float32 products are faster there than
    emulated bfloat16 ones, and closer to the oracle.
    """
    assert isinstance(weight, NF4)
    out_features, in_features = weight.shape
    on_cpu = x.device.type == "cpu"
    compute = torch.float32 if on_cpu else x.dtype
    tokens = x.reshape(-1, in_features).to(compute)
    out = torch.empty(tokens.shape[0], out_features, dtype=compute, device=x.device)
    step = max(1, TILE_ELEMENTS // in_features) if on_cpu else out_features
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        torch.mm(tokens, weight.rows(start, stop, compute).T, out=out[:, start:stop])
    return out.to(x.dtype).view(*x.shape[:-1], out_features)
