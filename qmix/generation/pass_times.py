"""PassTimes: what a pass takes by its rows, as measured, and otherwise as estimated.

Knows no model: somebody else looks at the clock.
"""

from collections import deque

_TIMES = 5  # of a size that are remembered
_STALE = 256  # passes after which a time is measured anew
_KEPT = 8  # passes for which an estimate is kept: it takes microseconds
_DENSEST = 16
# Of a pass of 16 rows beside one: the bytes of Mixtral's experts, and the attention between them.
_SIXTEEN = 3.5


class PassTimes:
    """Times of passes, by their rows."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._timed: dict[int, int] = {}  # the pass in which a size was measured last
        self._passes = 0
        self._estimates: dict[int, float] = {}

    def took(self, rows: int, seconds: float) -> None:
        """The time of a pass."""
        self._passes += 1
        if self._passes % _KEPT and self._is_fresh(rows):
            self._estimates.pop(rows, None)
        else:
            self._estimates.clear()
        if not self._is_fresh(rows):
            self._times[rows] = deque(maxlen=_TIMES)
        self._times[rows].append(seconds)
        self._timed[rows] = self._passes

    def measured(self, rows: int) -> int:
        """How many times of a size are known; 0: none, or only old ones."""
        return len(self._times[rows]) if self._is_fresh(rows) else 0

    def seconds(self, rows: int) -> float:
        """The time of a pass: the median, or on a line through the sizes that were measured.

        At least one size must be known.
        """
        if rows not in self._estimates:
            self._estimates[rows] = self._estimated(rows)
        return self._estimates[rows]

    def _estimated(self, rows: int) -> float:
        if self._is_fresh(rows):
            return self._median(rows)
        least, *others = sorted(size for size in self._times if self._is_fresh(size))
        start, begun = self._median(least), _share(least)
        if not others:
            slope = start * (_SIXTEEN - 1) / (1 + (_SIXTEEN - 1) * begun)
        else:
            nearest = min(others, key=lambda size: abs(size - rows))
            slope = max(self._median(nearest) - start, 0.0) / (_share(nearest) - begun)
        return start + slope * (_share(rows) - begun)

    def _is_fresh(self, rows: int) -> bool:
        """Whether a size was measured, and not long ago."""
        timed = self._timed.get(rows)
        return timed is not None and self._passes - timed < _STALE

    def _median(self, rows: int) -> float:
        times = sorted(self._times[rows])
        return (times[(len(times) - 1) // 2] + times[len(times) // 2]) / 2


def _share(rows: int) -> float:
    """How much of what 16 rows cost beyond one such a pass costs: experts are shared, 2 of 8."""
    return float((1 - 0.75 ** (rows - 1)) / (1 - 0.75 ** (_DENSEST - 1)))
