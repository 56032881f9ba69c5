"""Random weights of every kind that the packed layout holds."""

from dataclasses import replace

import torch

from qmix.weights.affine import Affine, pack_codes
from qmix.weights.nf4 import quantize
from qmix.weights.packed import codes
from qmix.weights.packed.layout import unpack_matrix
from qmix.weights.scheme import Scheme
from qmix.weights.table import Table


def nf4(rows, columns, seed=0, block=64, double=False):
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns, generator=generator)
    return quantize(weight.bfloat16(), Scheme(kind="nf4", block_size=block, double_quant=double))


def int4(rows, columns, seed=0, group=64, symmetric=True, dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, columns // group, generator=generator) / 50 + 0.001).to(dtype)
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=generator)
    return Affine(pack_codes(codes), scales, None if symmetric else zeros)


def act_order(rows, columns, seed=0):
    """Two matrices of as many inputs and of near seeds have the same order, as w1 and w3 have."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return replace(int4(rows, columns, seed, symmetric=False), perm=order.int())


def as_computed(packed):
    """The weight with the table and the scales of the kernels, float32."""
    weight = unpack_matrix(packed)
    if isinstance(weight, Table):
        values = [codes.NF4_STORED_VALUES[stored] for stored in codes.NF4_STORED_OF_CODE]
        table = torch.tensor(values, device=weight.device) / codes.NF4_STRETCH
        weight = replace(weight, table=table)
    return weight.dequantize(torch.float32)


KINDS = {
    "nf4": nf4,
    "nf4 nested": lambda n, k, seed=0: nf4(n, k, seed, double=True),
    "int4 g64": int4,
    "int4 asymmetric": lambda n, k, seed=0: int4(n, k, seed, symmetric=False),
    "int4 per output": lambda n, k, seed=0: int4(n, k, seed, group=k),
    "int4 act-order": act_order,
    "int4 bfloat16 scales": lambda n, k, seed=0: int4(n, k, seed, dtype=torch.bfloat16),
}
