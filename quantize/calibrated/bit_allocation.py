"""Which weights deserve more bits: the Recipe of least measured loss within a budget of bits.

Losses are added as if errors were independent, and bits go where a bit takes away most loss. Knows
nothing of how a loss is measured (`sensitivity`).
"""

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qmix.errors import UsageError
from qmix.formats.names import ModelTensor
from qmix.weights.scheme import Recipe, Scheme

# From the fewest bits to the most. Every weight has at least the first.
SCHEMES = (
    Scheme(kind="int4", group_size=128),
    Scheme(kind="int4", group_size=64),
    Scheme(kind="int4", group_size=32),
    Scheme(kind="int8", group_size=128),
)


@dataclass(frozen=True)
class QuantGroup:
    """Weights that share a scheme, and their loss under each of SCHEMES."""

    tensors: tuple[ModelTensor, ...]
    losses: tuple[float, ...]

    @property
    def parameters(self) -> int:
        return sum(tensor.shape[0] * tensor.shape[1] for tensor in self.tensors)


def check_bits(bits: float) -> None:
    """Refuse a budget that no recipe can meet.

    Raises:
        UsageError: it is out of range; the message gives the range.
    """
    low, high = SCHEMES[0].bits_per_weight, SCHEMES[-1].bits_per_weight
    if not low <= bits <= high:
        raise UsageError("out of range", where="--bits", expected=f"{low} to {high}", found=bits)


def allocate_bits(groups: Sequence[QuantGroup], bits: float) -> Recipe:
    """Spend a budget greedily: always raise the group whose next step saves most loss a bit.

    Args:
        bits: bits a weight, scales included, averaged over the groups' weights.
    """
    left = sum(group.parameters for group in groups) * (bits - SCHEMES[0].bits_per_weight)
    levels = [0] * len(groups)
    steps = [step for index in range(len(groups)) if (step := _best_step(groups[index], index, 0))]
    heapq.heapify(steps)
    while steps:
        _, index, level, cost = heapq.heappop(steps)
        if cost > left * (1 + 1e-9):
            continue
        left -= cost
        levels[index] = level
        if following := _best_step(groups[index], index, level):
            heapq.heappush(steps, following)
    rules = [
        (re.escape(tensor.name), SCHEMES[level])
        for group, level in zip(groups, levels, strict=True)
        for tensor in group.tensors
    ]
    return Recipe(tuple(rules))


def _best_step(group: QuantGroup, index: int, level: int) -> tuple[float, int, int, float] | None:
    """The best step up from `level`; None if no step saves any loss.

    Returns:
        The negative of the loss saved a bit, the group's index, the new level, and the bits it
        costs.
    """
    best = None
    for higher in range(level + 1, len(SCHEMES)):
        gain = group.losses[level] - group.losses[higher]
        cost = group.parameters * (SCHEMES[higher].bits_per_weight - SCHEMES[level].bits_per_weight)
        if gain > 0 and (best is None or -gain / cost < best[0]):
            best = (-gain / cost, index, higher, cost)
    return best
