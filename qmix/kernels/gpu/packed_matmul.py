"""Matmuls with packed weights on a GPU: one matrix, or the chosen experts of a layer.

Imports triton with the first matmul. Shape letters: see qmix.kernels.
"""

import torch
from torch import Tensor

from qmix.kernels import tiles
from qmix.kernels.gradients import needs_grad
from qmix.kernels.moe import Routes
from qmix.weights.dense import Weight
from qmix.weights.packed.weight import PackedExperts, PackedWeight


def linear(x: Tensor, weight: Weight) -> Tensor:
    """[..., K] -> [..., N] in x's dtype.

    Gradients, and single matrices of an expert, go through the standard weight. Some rows of a
    matrix are those of the whole product.
    """
    assert isinstance(weight, PackedWeight)
    rows = weight.selection
    if isinstance(rows, str) or needs_grad(x):
        return tiles.linear(x, weight.unpack())
    from qmix.kernels.gpu import moe as gpu

    out = gpu.linear(x, weight.matrix)
    return out if rows is None else out[..., rows.start : rows.stop]


def experts(x: Tensor, routes: Routes, weights: PackedExperts) -> Tensor:
    """Each token through its chosen SwiGLU experts: [T, D] -> [T, D]."""
    from qmix.kernels.gpu import moe as gpu

    return gpu.experts(x, routes, weights.table, 0)


def expert_pairs(x: Tensor, routes: Routes, weights: PackedExperts) -> Tensor:
    """`experts` before the sum: the output of each choice times its weight, float32 [T, k, D]."""
    from qmix.kernels.gpu import moe as gpu

    partials = gpu.expert_partials(x.to(torch.float16), routes, weights.table, 0)
    return partials.sum(0).view(*routes.ids.shape, x.shape[1])
