"""Estimates with intervals, by drawing whole windows or documents again, never single tokens.

The tokens of one window depend on each other, so a window is the unit. What is compared is summed
over the same units: what makes a unit hard for both models cancels. Shape letters: U units, C
columns, R resamples. Knows nothing of what the sums are of.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
LEAST_UNITS = 10  # of ten skewed units an interval held the truth in 78 of 100 cases, of 47 in 90
_RESAMPLES = 10_000
_SEED = 0
_CELLS = 1 << 22  # counts that exist at once: 34 MB


@dataclass(frozen=True)
class Interval:
    """Both ends of a percentile bootstrap's interval at LEVEL."""

    low: float
    high: float

    def __str__(self) -> str:
        return self.shown("g")

    def shown(self, form: str) -> str:
        """In words, its ends by a format such as `.4f`."""
        return f"{100 * LEVEL:g} %: {self.low:{form}} to {self.high:{form}}"


@dataclass(frozen=True)
class Estimate:
    """A statistic of all units.

    Attributes:
        interval: None of fewer units than LEAST_UNITS.
    """

    value: float
    interval: Interval | None

    def shown(self, form: str) -> str:
        """In words, its figures by a format such as `.4f`."""
        if self.interval is None:
            return f"{self.value:{form}}"
        return f"{self.value:{form}} ({self.interval.shown(form)})"


def estimate(sums: Tensor, statistic: Callable[[Tensor], Tensor]) -> Estimate:
    """A statistic of sums over units, with its interval. The same sums give the same interval.

    Args:
        sums: float64 (U, C), what each unit adds to each column.
        statistic: from sums over units (..., C) to figures (...).
    """
    value = float(statistic(sums.sum(0)))
    if len(sums) < LEAST_UNITS:
        return Estimate(value, None)
    tail = (1 - LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = statistic(_resampled(sums)).quantile(ends).tolist()
    return Estimate(value, Interval(low, high))


def _resampled(sums: Tensor) -> Tensor:
    """Sums over U units that are drawn with replacement, (R, C)."""
    units = len(sums)
    generator = torch.Generator().manual_seed(_SEED)
    step = max(1, _CELLS // units)
    parts = []
    for start in range(0, _RESAMPLES, step):
        rows = min(step, _RESAMPLES - start)
        drawn = torch.randint(units, (rows, units), generator=generator)
        counts = torch.zeros(rows, units, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones(rows, units, dtype=torch.float64))
        parts.append(counts @ sums)
    return torch.cat(parts)
