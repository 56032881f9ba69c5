"""Random 4-bit weights for the CPU kernels, and the best instruction set of this processor."""

from functools import cache

import torch

from qmix.kernels.cpu.isa import ISAS
from qmix.kernels.cpu.library import library
from qmix.weights.integers import Int4
from qmix.weights.nf4 import FP4, FP4_VALUES, NF4, NF4_VALUES, NestedAbsmax


@cache
def best() -> int:
    """The place in ISAS of this processor's best instruction set; -1 without a compiler."""
    found = library().isa
    return ISAS.index(found) if found else -1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_bytes(*shape, seed=0, high=256):
    return torch.randint(0, high, shape, dtype=torch.uint8, generator=seeded(seed))


def random_nf4(n, k, block=64, nested=False, kind=NF4):
    blocks = -(-n * k // block)
    absmax = 0.01 + 0.1 * torch.rand(blocks, generator=seeded(1))
    if nested:
        absmax = NestedAbsmax(
            codes=random_bytes(blocks, seed=2),
            absmax=0.01 + 0.1 * torch.rand(-(-blocks // 256), generator=seeded(3)),
            map=torch.linspace(-1, 1, 256),
            offset=0.05,
        )
    table = torch.tensor(FP4_VALUES if kind is FP4 else NF4_VALUES)
    return kind(random_bytes(-(-n * k // 2)), absmax, table, (n, k), torch.bfloat16, block)


def random_int4(n, k, groups=1, zeros=False, perm=False, dtype=torch.float16):
    scales = 0.001 + 0.01 * torch.rand(n, groups, generator=seeded(1))
    return Int4(
        codes=random_bytes(n, k // 2),
        scales=(scales * (1 - 2 * torch.randint(0, 2, scales.shape, generator=seeded(4)))).to(
            dtype
        ),
        zeros=random_bytes(n, groups, seed=2, high=16) if zeros else None,
        perm=torch.randperm(k, generator=seeded(3)).int() if perm else None,
    )
