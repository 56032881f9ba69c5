"""Small random weights and inputs, by which a backend shows that it computes what torch computes.

Knows no backend. Shape letters: see qmix.kernels.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels import pointwise
from qmix.kernels.moe import Routes
from qmix.weights.affine import Affine
from qmix.weights.dense import Weight
from qmix.weights.scheme import Scheme
from qmix.weights.table import VALUES, Table

TOKENS = (1, 16, 40)  # matrix instructions of 8 and 16 columns, and experts that are sorted
# Of the largest value. Roundings reach 0.4 % of it, in bfloat16; one wrong weight of a row makes 3.
BOUND = 1e-2


@dataclass(frozen=True, eq=False)
class Comparison:
    """A kernel's result, and torch's."""

    what: str
    found: Tensor
    wanted: Tensor

    @property
    def error(self) -> float:
        """The largest difference, relative to the largest value; infinite for NaN."""
        if not bool(torch.isfinite(self.found).all()):
            return float("inf")
        wanted = self.wanted.float()
        difference = (self.found.float() - wanted).abs().max()
        return float(difference / wanted.abs().max())


def first_beyond(comparisons: Iterable[Comparison]) -> Comparison | None:
    """The first comparison that misses the bound; the others are not made."""
    return next((each for each in comparisons if not each.error <= BOUND), None)


class Draw:
    """Random tensors on a device, the same ones each time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, dtype)

    def integers(self, end: int, *shape: int) -> Tensor:
        drawn = torch.randint(0, end, shape, dtype=torch.uint8, generator=self._generator)
        return drawn.to(self.device)

    def scales(self, *shape: int) -> Tensor:
        return (torch.rand(*shape, generator=self._generator) / 50 + 0.01).to(self.device)

    def routes(self, tokens: int, experts: int, choices: int) -> Routes:
        logits = self.normal(tokens, experts)
        return pointwise.route(logits, choices)


def inputs_of(scheme: Scheme) -> int:
    """Inputs in whole groups, and in whole panels where they are outputs too."""
    group = scheme.group_size if scheme.integer else scheme.block_size
    return max(256, group)


def weight_of(scheme: Scheme, shape: tuple[int, int], draw: Draw) -> Weight:
    """A random weight [N, K] as the scheme stores it, with plain scales."""
    rows, inputs = shape
    if scheme.integer:
        groups = 1 if scheme.group_size == -1 else inputs // scheme.group_size
        return Affine(
            draw.integers(256, rows, inputs * scheme.bits // 8),
            draw.scales(rows, groups).half(),
            None if scheme.symmetric else draw.integers(1 << scheme.bits, rows, groups),
            bits=scheme.bits,
        )
    kind = next(kind for kind in VALUES if kind == scheme.kind)
    return Table(
        codes=draw.integers(256, rows * inputs // 2),
        scales=draw.scales(rows * inputs // scheme.block_size),
        table=torch.tensor(VALUES[kind], device=draw.device),
        out_shape=shape,
        out_dtype=torch.float32,
        block_size=scheme.block_size,
        kind=kind,
    )
