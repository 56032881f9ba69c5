"""Random 4-bit weights for the CPU kernels, and the best instruction set of this processor."""

from functools import cache

import torch

from qmix.kernels.cpu.isa import ISAS
from qmix.kernels.cpu.library import library
from qmix.weights.affine import Affine
from qmix.weights.scales import NestedScales
from qmix.weights.table import VALUES, Table


@cache
def best() -> int:
    """The place in ISAS of this processor's best instruction set; -1 without a compiler."""
    found = library().isa
    return ISAS.index(found) if found else -1


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
