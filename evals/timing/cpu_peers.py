"""The experts of a layer by other kernels on the CPU: torch's two ways, and bitsandbytes.

Each peer gets the bytes that our kernels get. Shape letters: T tokens, N outputs, K inputs. Knows
nothing of time.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.kernels import Routes, tiles
from qmix.kernels.moe import moe_forward
from qmix.weights.affine import Affine
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert
from qmix.weights.table import Table

ExpertsForward = Callable[[Tensor, Routes], object]
_Matmul = Callable[[Tensor], Tensor]


def dequantizing(experts: Sequence[Expert]) -> ExpertsForward:
    """Dequantize a tile and let torch multiply it, which is what runs without a compiler."""

    def linears(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        return [tiles.linear(x, weight) for weight in weights]

    return lambda x, routes: moe_forward(x, routes, experts, F.silu, linears)


def int4pack(experts: Sequence[Expert]) -> ExpertsForward | None:
    """torch's `_weight_int4pack_mm_for_cpu`; None for weights without plain scales."""
    first = experts[0].w1
    if not isinstance(first, Affine) or not isinstance(first.scales, Tensor):
        return None

    def matmul(weight: Weight) -> _Matmul:
        assert isinstance(weight, Affine)
        assert isinstance(weight.scales, Tensor)
        codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).view(weight.shape)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        scales = weight.scales.t().bfloat16()
        scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda x: multiply(x, packed, weight.group_inputs, scales_and_zeros)

    return partial(_forward, matmuls=_matmuls(experts, matmul))


def bitsandbytes(experts: Sequence[Expert]) -> ExpertsForward | None:
    """bitsandbytes' matmul_4bit; None for weights other than NF4 with plain absmax.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    functional: Any = importlib.import_module("bitsandbytes.functional")
    package: Any = importlib.import_module("bitsandbytes")
    first = experts[0].w1
    if not isinstance(first, Table) or not isinstance(first.scales, Tensor):
        return None

    def matmul(weight: Weight) -> _Matmul:
        assert isinstance(weight, Table)
        assert isinstance(weight.scales, Tensor)
        state = functional.QuantState(
            absmax=weight.scales,
            shape=torch.Size(weight.shape),
            dtype=torch.bfloat16,
            blocksize=weight.block_size,
            code=weight.table,
            quant_type="nf4",
        )
        codes = weight.codes.view(-1, 1)
        return lambda x: package.matmul_4bit(x, codes.t(), state)

    return partial(_forward, matmuls=_matmuls(experts, matmul))


def _matmuls(
    experts: Sequence[Expert], matmul: Callable[[Weight], _Matmul]
) -> list[tuple[_Matmul, _Matmul, _Matmul]]:
    return [(matmul(each.w1), matmul(each.w2), matmul(each.w3)) for each in experts]


def _forward(
    x: Tensor, routes: Routes, matmuls: Sequence[tuple[_Matmul, _Matmul, _Matmul]]
) -> None:
    """Run each expert on its tokens; the sum over experts, which costs little, is left out."""
    for index in torch.unique(routes.ids).tolist():
        w1, w2, w3 = matmuls[index]
        token = torch.where(routes.ids == index)[0]
        tokens = x[token]
        w2(F.silu(w1(tokens)) * w3(tokens))
