"""Random 4-bit weights for the CPU kernels, and the best instruction set of this processor."""

from collections.abc import Sequence
from functools import cache

import torch

from qmix.instruction_sets import supported
from qmix.kernels.cpu.library import library
from qmix.weights.affine import Affine
from qmix.weights.scales import NestedScales
from qmix.weights.table import VALUES, Table


class View(Sequence):
    """Experts that come one at a time, as a store's do."""

    def __init__(self, experts):
        self.experts, self.asked = experts, []

    def __len__(self):
        return len(self.experts)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.experts[index]


@cache
def available() -> tuple[str, ...]:
    """The instruction sets that this processor has; none without a compiler."""
    return tuple(each.name for each in supported()) if library().isa else ()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape, seed=0, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=seeded(seed))


def random_nf4(n, k, block=64, nested=False, kind="nf4"):
    blocks = -(-n * k // block)
    scales = 0.01 + 0.1 * torch.rand(blocks, generator=seeded(1))
    if nested:
        scales = NestedScales(
            codes=random_bytes(blocks, seed=2),
            outer=0.01 + 0.1 * torch.rand(-(-blocks // 256), generator=seeded(3)),
            map=torch.linspace(-1, 1, 256),
            offset=0.05,
        )
    table = torch.tensor(VALUES[kind])
    codes = random_bytes(-(-n * k // 2))
    return Table(codes, scales, table, (n, k), torch.bfloat16, block, kind)


def random_int4(n, k, groups=1, zeros=False, perm=False, dtype=torch.float16):
    scales = 0.001 + 0.01 * torch.rand(n, groups, generator=seeded(1))
    return Affine(
        codes=random_bytes(n, k // 2),
        scales=(scales * (1 - 2 * torch.randint(0, 2, scales.shape, generator=seeded(4)))).to(
            dtype
        ),
        zeros=random_bytes(n, groups, seed=2, high=16) if zeros else None,
        perm=torch.randperm(k, generator=seeded(3)).int() if perm else None,
    )


# How scales may be stored: the bits of a code, the dtype of what they are multiplied by, and how
# many share that; 0 is all.
NESTED = {
    "8 bits of 256": (8, torch.float32, 256),
    "8 bits of all": (8, torch.float32, 0),
    "8 bits of 16": (8, torch.float16, 16),
    "6 bits of 8": (6, torch.float16, 8),
    "6 bits of 16": (6, torch.float16, 16),
    "6 bits of 24": (6, torch.float32, 24),
}
SCALES = (*NESTED, torch.float16, torch.bfloat16, torch.float32)


def random_scales(n, groups, form=torch.float16, sign=1, size=0.01, seed=1):
    """[n, groups] numbers up to `size`, of one of SCALES; 6 bits only for a multiple of 4."""
    if form not in NESTED:
        values = size * (0.1 + 0.9 * torch.rand(n, groups, generator=seeded(seed)))
        return (sign * values).to(form)
    bits, dtype, block = NESTED[form]
    block = block or n * groups
    blocks = -(-n * groups // block)
    return NestedScales(
        codes=random_bytes(n, groups * bits // 8, seed=seed),
        outer=(size * (0.1 + 0.9 * torch.rand(blocks, generator=seeded(seed + 7)))).to(dtype),
        map=sign * torch.linspace(0, 1, 1 << bits),
        offset=sign * 0.001,
        block=block,
        bits=bits,
    )


def random_affine(n, k, bits=4, group=32, scales=torch.float16, zeros=None, biases=None):
    """Codes of so many bits in groups of `group` inputs.

    Args:
        scales: one of SCALES, and so is `biases`, if not None.
        zeros: a dtype; None is a symmetric weight, or one with biases.
    """
    groups = k // group
    middle = 1 << bits - 1
    whole = random_bytes(n, groups, seed=2, high=2 * middle)
    fractions = middle + torch.randn(n, groups, generator=seeded(2))
    return Affine(
        codes=random_bytes(n, k * bits // 8),
        scales=random_scales(n, groups, scales),
        zeros=None if zeros is None else (whole if zeros == torch.uint8 else fractions.to(zeros)),
        bits=bits,
        biases=biases and random_scales(n, groups, biases, sign=-1, size=0.01 * middle, seed=5),
    )


def random_table(n, k, kind="e2m1", block=16, scales="8 bits of all", high_first=False):
    """A table of some kind in blocks that do not straddle rows."""
    table = torch.tensor(VALUES[kind])
    return Table(
        codes=random_bytes(n * k // 2),
        scales=random_scales(n, k // block, scales),
        table=table,
        out_shape=(n, k),
        out_dtype=torch.bfloat16,
        block_size=block,
        kind=kind,
        high_first=high_first,
    )
