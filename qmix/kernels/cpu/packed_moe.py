"""Experts in the packed layout, multiplied on the CPU from the very blob that a GPU would read.

Packing has rounded the scales (qmix.weights.packed.layout), and activations are rounded to 16 bits
with a scale for each tile: a matmul errs by 0.01 % of one with the unpacked weight. Shape letters:
see qmix.kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.kernels import tiles
from qmix.kernels.cpu.library import library
from qmix.kernels.moe import Routes
from qmix.weights.packed.layout import PackedExpert, PackedMatrix, unpack_expert


def experts(x: Tensor, routes: Routes, weights: Sequence[PackedExpert]) -> Tensor:
    """`sum_k weight_k * w2(silu(w1 x) * w3 x)` in float32: (T, D) of any dtype -> float32 (T, D).

    Summed in ascending expert order. `weights[i]` is asked for once for each chosen expert, in
    ascending order, and let go before the next. Its blob lies in host memory.
    """
    out = torch.zeros(x.shape, dtype=torch.float32)
    x = x.detach().to(torch.float32)
    for index in torch.unique(routes.ids).tolist():
        token, slot = torch.where(routes.ids == index)
        y = _expert(x[token], weights[index]) * routes.weights[token, slot, None].float()
        out.index_add_(0, token, y)
    return out


def is_compiled(packed: PackedExpert) -> bool:
    """Whether a compiled kernel multiplies the expert; if not, it is unpacked, which takes seconds.

    It knows two to four bits, groups of 32 and more, and zeros that are codes.
    """
    return library().isa is not None and all(
        matrix.format.bits <= 4 and not matrix.format.scales_weights and not matrix.free_zeros
        for matrix in (packed.gate_up, packed.down)
    )


def _expert(x: Tensor, packed: PackedExpert) -> Tensor:
    compiled = library()
    if not is_compiled(packed):
        compiled.fallbacks += 3
        expert = unpack_expert(packed)
        gate, up = (tiles.linear(x, weight) for weight in (expert.w1, expert.w3))
        return tiles.linear(F.silu(gate) * up, expert.w2)

    def matmul(x: Tensor, matrix: PackedMatrix) -> Tensor:
        values = torch.tensor(matrix.values)
        if matrix.format.bits < 4:
            values = values[0] + torch.arange(16.0)
        return compiled.matmul_packed(x, matrix, values)

    perm = packed.gate_up.perm
    both = matmul(x if perm is None else x.index_select(1, perm), packed.gate_up)
    down = matmul(F.silu(both[:, 0]) * both[:, 1], packed.down)
    # The 64 rows of the low plane of a panel, then the 64 of its high plane.
    return down.view(len(x), 2, -1, 64).transpose(1, 2).reshape(len(x), -1)
