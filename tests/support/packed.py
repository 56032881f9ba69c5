"""Random weights of every kind that the packed layout holds."""

from dataclasses import replace
from functools import partial

import torch

from qmix.weights.affine import Affine, pack_codes
from qmix.weights.nf4 import quantize
from qmix.weights.packed import codes
from qmix.weights.packed.layout import unpack_matrix
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import Scheme
from qmix.weights.table import VALUES, Table


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
        stored = codes.TABLES[weight.kind]
        values = [stored.values[number] for number in stored.stored_of_code]
        table = torch.tensor(values, device=weight.device) / stored.stretch
        weight = replace(weight, table=table)
    return weight.dequantize(torch.float32)


def table(kind, rows, columns, seed=0, block=32):
    """Codes of another table, drawn, with scales that are nested as those of NVFP4 are."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, generator=generator)
    blocks = rows * columns // block
    scales = NestedScales(
        torch.randint(1, 256, (blocks,), dtype=torch.uint8, generator=generator),
        torch.tensor([0.01]),
        torch.arange(256) / 256,
        block=blocks,
    )
    shape = (rows, columns)
    return Table(
        packed, scales, torch.tensor(VALUES[kind]), shape, torch.bfloat16, block, kind,
        high_first=kind == "fp4",
    )  # fmt: skip


def affine(rows, columns, seed=0, *, bits=4, group=32, how="biases"):
    """Integers with nested scales, with biases, or with zeros that are no codes."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    shape = (rows, columns // group)
    scales = torch.rand(shape, generator=generator) / 50 + 0.001
    inside = torch.rand(shape, generator=generator) * ((1 << bits) - 1)
    packed = pack_codes(codes, bits)
    if how == "symmetric":
        return Affine(packed, scales.half(), bits=bits)
    if how == "zeros":
        return Affine(packed, scales.half(), inside, bits=bits)
    if how == "nested":
        steps = torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)
        nested = NestedScales(
            steps, torch.tensor([0.02]), torch.arange(256) / 256, block=shape[0] * shape[1]
        )
        return Affine(packed, nested, bits=bits, out_dtype=torch.bfloat16)
    return Affine(packed, scales.half(), bits=bits, biases=(-inside * scales).half())


# Beside NF4 and plain Int4: what packing brings into their form.
OTHERS = {
    **{kind: partial(table, kind) for kind in ("fp4", "e2m1", "iq4")},
    "nf4 b32": partial(nf4, block=32),
    "int4 g32": partial(int4, group=32),
    **{f"int4 {how}": partial(affine, how=how) for how in ("biases", "zeros", "nested")},
    "int3 symmetric": partial(affine, bits=3, how="symmetric"),
    "int2 biases": partial(affine, bits=2, group=64),
}

KINDS = {
    "nf4": nf4,
    "nf4 nested": lambda n, k, seed=0: nf4(n, k, seed, double=True),
    "int4 g64": int4,
    "int4 asymmetric": lambda n, k, seed=0: int4(n, k, seed, symmetric=False),
    "int4 per output": lambda n, k, seed=0: int4(n, k, seed, group=k),
    "int4 act-order": act_order,
    "int4 bfloat16 scales": lambda n, k, seed=0: int4(n, k, seed, dtype=torch.bfloat16),
}
