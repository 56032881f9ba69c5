"""Which weights deserve more bits: the Recipe of least measured loss within a budget of bits.

Losses are added as if errors were independent, and bits go where a bit takes away most loss. Knows
nothing of how a loss is measured (`sensitivity`).
"""

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.formats.names import ModelTensor, model_tensors
from qmix.weights.scheme import Recipe, Scheme


def _integers(kind: Literal["int2", "int3", "int4", "int8"], group_size: int) -> Scheme:
    return Scheme(kind=kind, group_size=group_size)


# What a budget is spent on, from the fewest bits to the most: symmetric, as other programs want it.
NARROW = (
    *(_integers("int2", 64), _integers("int2", 32)),
    *(_integers("int3", 128), _integers("int3", 32)),
    *(_integers("int4", 128), _integers("int4", 32)),
    _integers("int8", 128),
)
WIDE = (*(_integers("int4", size) for size in (128, 64, 32)), _integers("int8", 128))
DEFAULT_BITS = 4.25
LEAST_BITS, MOST_BITS = 2.5, WIDE[-1].bits_per_weight


@dataclass(frozen=True)
class Choices:
    """The schemes that a group of weights may get.

    Attributes:
        schemes: from the fewest bits to the most. Every group has at least the first.
        typical: the scheme with which it is measured what a change costs in the end.
    """

    schemes: tuple[Scheme, ...]
    typical: Scheme


def choices_for(bits: float) -> Choices:
    """What is measured for a budget. Each scheme takes time, so few are.

    Raises:
        UsageError: no recipe can meet the budget; the message gives the range.
    """
    if not LEAST_BITS <= bits <= MOST_BITS:
        expected = f"{LEAST_BITS} to {MOST_BITS}"
        raise UsageError("out of range", where="--bits", expected=expected, found=bits)
    if bits >= WIDE[0].bits_per_weight:
        return Choices(WIDE, WIDE[0])
    affordable = [scheme for scheme in NARROW if scheme.bits_per_weight <= bits]
    return Choices(NARROW, affordable[-1])


@dataclass(frozen=True)
class QuantGroup:
    """Weights that share a scheme, and their loss under each scheme that they may get."""

    tensors: tuple[ModelTensor, ...]
    losses: tuple[float, ...]
    schemes: tuple[Scheme, ...]

    @property
    def parameters(self) -> int:
        return sum(tensor.shape[0] * tensor.shape[1] for tensor in self.tensors)


def allocate_bits(groups: Sequence[QuantGroup], bits: float) -> Recipe:
    """Spend a budget greedily: always raise the group whose next step saves most loss a bit.

    Args:
        bits: bits a weight, scales included, averaged over the groups' weights.
    """
    left = sum(g.parameters * (bits - g.schemes[0].bits_per_weight) for g in groups)
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
    names: dict[Scheme, list[str]] = {}
    for group, level in zip(groups, levels, strict=True):
        found = names.setdefault(group.schemes[level], [])
        found += (re.escape(tensor.name) for tensor in group.tensors)
    return Recipe(tuple(("|".join(found), scheme) for scheme, found in names.items()))


def loss_of(groups: Sequence[QuantGroup], recipe: Recipe) -> float:
    """The loss that a recipe should have: the sum of its groups' losses."""
    chosen = (recipe.scheme_of(group.tensors[0].name) for group in groups)
    return sum(
        group.losses[group.schemes.index(scheme)]
        for group, scheme in zip(groups, chosen, strict=True)
    )


def alike(config: MixtralConfig, bits: float) -> Recipe:
    """What a budget would buy if every weight deserved the same; nothing is measured.

    As where it is measured, q, k and v share a scheme, and so do w1 and w3 of an expert.

    Raises:
        UsageError: as `choices_for`.
    """
    schemes = choices_for(bits).schemes
    losses = [4.0**-scheme.bits_per_weight for scheme in schemes]
    together: dict[str, list[ModelTensor]] = {}
    for tensor in model_tensors(config):
        if tensor.kind in ("attention", "expert"):
            name = re.sub(r"\bw3\b", "w1", re.sub(r"\b[kv]_proj\b", "q_proj", tensor.name))
            together.setdefault(name, []).append(tensor)
    groups = []
    for tensors in together.values():
        size = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors)
        groups.append(QuantGroup(tuple(tensors), tuple(size * loss for loss in losses), schemes))
    return allocate_bits(groups, bits)


def _best_step(group: QuantGroup, index: int, level: int) -> tuple[float, int, int, float] | None:
    """The best step up from `level`; None if no step saves any loss.

    Returns:
        The negative of the loss saved a bit, the group's index, the new level, and the bits it
        costs.
    """
    best = None
    bits = [scheme.bits_per_weight for scheme in group.schemes]
    for higher in range(level + 1, len(bits)):
        gain = group.losses[level] - group.losses[higher]
        cost = group.parameters * (bits[higher] - bits[level])
        if gain > 0 and (best is None or -gain / cost < best[0]):
            best = (-gain / cost, index, higher, cost)
    return best
