"""Random weights of every kind that the packed layout holds."""

from dataclasses import replace
from functools import partial

import torch

from qmix.weights.affine import Affine, pack_codes
from qmix.weights.expert import Expert
from qmix.weights.nf4 import quantize
from qmix.weights.packed import layout
from qmix.weights.packed.codes import TABLES
from qmix.weights.packed.tile_format import BYTE_ROWS
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
    """The weight with the table, the scales and the roundings of the kernels, float32."""
    tile, stretch = packed.format, 1.0
    if tile.table is None or tile.own_table:
        factor, _, power, _ = packed.blob[:16].view(torch.float32).tolist()
        stretch = power / factor  # 1 for integers
        values = torch.tensor(packed.values) * stretch
    else:
        values, stretch = torch.tensor(TABLES[tile.table].values), TABLES[tile.table].stretch
    device = packed.blob.device
    powers = packed.blob[8:16].view(torch.float32)
    planes = []
    for plane, power in zip(layout._unpack(packed), powers, strict=True):
        weight = values.to(device)[plane.codes.long()]
        scales = plane.scales.repeat_interleave(tile.group_inputs, 1)
        if plane.zeros is not None:
            zeros = plane.zeros.repeat_interleave(tile.group_inputs, 1)
            weight = (weight + zeros).half().float()
        weight = weight * (scales / power)
        planes.append(
            (weight.half().float() if tile.scales_weights else weight) * (power / stretch)
        )
    rows = torch.arange(packed.shape[0], device=device).view(2, -1, BYTE_ROWS)
    weight = torch.cat(planes)[rows.transpose(0, 1).flatten()]
    return weight if packed.perm is None else weight[:, torch.argsort(packed.perm.long())]


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


def own_table(rows, columns, seed=0, block=64):
    """Sixteen values of which half a table's pairs have different signs."""
    values = torch.linspace(-0.9, 1.3, 16)
    return replace(table("nf4", rows, columns, seed, block), table=values)


def int8(rows, columns, seed=0, group=64):
    """Integers of eight bits whose zeros are codes."""
    weight = affine(rows, columns, seed, bits=8, group=group, how="symmetric")
    zeros = torch.randint(
        0, 256, weight.scales.shape, generator=torch.Generator().manual_seed(seed)
    )
    return replace(weight, zeros=zeros.to(torch.uint8))


def mixed_experts(width, hidden, device="cpu"):
    """Four experts in three forms of w1 with w3, one in an order of its own, and in two of w2."""
    kinds = ((int4, nf4), (act_order, int4), (int8, nf4), (int4, int4))
    return [
        Expert(
            make(width, hidden, seed).to(device),
            down(hidden, width, seed + 1).to(device),
            make(width, hidden, seed + 2).to(device),
        )
        for seed, (make, down) in zip(range(0, 40, 10), kinds, strict=True)
    ]


# Beside NF4 and plain Int4: what packing brings into their form, and into that of eight bits.
OTHERS = {
    **{kind: partial(table, kind) for kind in ("fp4", "e2m1", "iq4")},
    "nf4 b32": partial(nf4, block=32),
    "nf4 b256": partial(nf4, block=256),  # blocks straddle the rows of a narrow weight
    "int4 g32": partial(int4, group=32),
    **{f"int4 {how}": partial(affine, how=how) for how in ("biases", "zeros", "nested")},
    "int2 g64": partial(affine, bits=2, group=64, how="symmetric"),
    "int3 g128": partial(affine, bits=3, group=128, how="symmetric"),
    "int3 symmetric": partial(affine, bits=3, how="symmetric"),
    "int2 biases": partial(affine, bits=2, group=64),
    "own table": own_table,
    "own table b16": partial(own_table, block=16),
    "e2m1 b16": partial(table, "e2m1", block=16),
    "iq3_s": partial(table, "iq3_s", block=32),
    "iq3_xxs b16": partial(table, "iq3_xxs", block=16),
    "int2 biases g16": partial(affine, bits=2, group=16),
    "int3 nested g16": partial(affine, bits=3, group=16, how="nested"),
    "int8": partial(affine, bits=8, how="symmetric"),
    "int8 asymmetric": int8,
    "int8 per output": lambda n, k, seed=0: int8(n, k, seed, group=k),
    "int8 biases g16": partial(affine, bits=8, group=16),
    "int6 nested g16": partial(affine, bits=6, group=16, how="nested"),
    "int5 biases": partial(affine, bits=5),
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
