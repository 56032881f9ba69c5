"""Which expert is worth a slot: decayed heat and recency in integers, behind one key.

Heat is Q16: 65536 stands for one activation just now. Knows no slots, no copies and no tensors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qmix.errors import UsageError

ONE = 1 << 16  # 1.0 in Q16

PolicyName = Literal["heat", "lru", "lfu", "static"]


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """How experts are ordered and how many may move. All policies are settings of one key.

    Attributes:
        decay: the Q16 factor by which every token multiplies all heat; 65536 forgets nothing.
        gain: the Q16 heat of one activation.
        margin: by how much a missed expert's score must exceed that of the expert it replaces, in
            Q16 heat, or in activations if recency is weighted.
        uploads: the most admissions a token; None sets no limit.
        heat_weight, recency_weight: of the score, see Policy.score.

    Raises:
        UsageError: a value out of its range.
    """

    decay: int = 64881  # 0.99: heat halves in 69 tokens
    gain: int = ONE
    margin: int = 2 * ONE
    uploads: int | None = 4
    heat_weight: int = 1
    recency_weight: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise UsageError("out of range", where=name, expected="0 or more", found=value)
        if self.decay > ONE:
            raise UsageError(
                "out of range", where="decay", expected=f"0 to {ONE}", found=self.decay
            )


HEAT = PolicySettings()
LRU = PolicySettings(margin=0, uploads=None, heat_weight=0, recency_weight=1)
LFU = PolicySettings(decay=ONE, margin=0, uploads=None)
STATIC = PolicySettings(decay=ONE, gain=0, uploads=0)  # the order of the heat file, unchanged

PRESETS: Mapping[PolicyName, PolicySettings] = {
    "heat": HEAT,
    "lru": LRU,
    "lfu": LFU,
    "static": STATIC,
}


class Policy:
    """Heat and last use of every expert.

    Attributes:
        heat: of each expert, Q16.
        last_use: the number of each expert's last activation, counted over all experts; 0 if it
            has none.

    Args:
        experts: how many there are.
        heat: the heat to start from, as in a heat file; default: 0.
    """

    def __init__(
        self, experts: int, settings: PolicySettings = HEAT, *, heat: Sequence[int] | None = None
    ) -> None:
        assert heat is None or len(heat) == experts, len(heat)
        self.settings = settings
        self.heat = [0] * experts if heat is None else list(heat)
        self.last_use = [0] * experts
        self._activations = 0

    def touch(self, expert: int) -> None:
        """An activation in the middle of a token: it counts for recency only."""
        self._activations += 1
        self.last_use[expert] = self._activations

    def used(self, experts: Iterable[int]) -> None:
        """A token activated these experts, in this order; an expert named twice counts once."""
        decay, gain = self.settings.decay, self.settings.gain
        if decay != ONE:
            self.heat = [heat * decay >> 16 for heat in self.heat]
        for expert in dict.fromkeys(experts):
            self.heat[expert] += gain
            self.touch(expert)

    def score(self, expert: int) -> int:
        """`heat_weight * heat + recency_weight * last_use`, the unit of the margin."""
        settings = self.settings
        return (
            settings.heat_weight * self.heat[expert]
            + settings.recency_weight * self.last_use[expert]
        )

    def key(self, expert: int) -> tuple[int, int, int]:
        """(score, last use, id): the lowest is evicted first, and no two are equal."""
        return self.score(expert), self.last_use[expert], expert

    def order(self, per_layer: int) -> list[int]:
        """All ids for a warm start: hottest first, equally hot ones layer by layer in turn.

        Args:
            per_layer: experts a layer.
        """
        return sorted(
            range(len(self.heat)),
            key=lambda expert: (-self.heat[expert], expert % per_layer, expert),
        )
