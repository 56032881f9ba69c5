"""DraftLength: how many ids are worth drafting, by what was measured while the text was written.

A draft pays if a pass over it gives more ids a second than single steps do. Both sides are
measured: how often the next id was the one that followed a match of such a length, whether it was
drafted or not; and the time of passes by their rows. So drafts end where they do not pay, and
begin again where the text repeats. Knows no model and no ids.
"""

from bisect import bisect_right
from collections import deque
from statistics import median

# Rows of a pass. Few sizes, so that each is measured often.
_ROWS = (2, 4, 8, 12, 16)
_MATCHES = (3, 4, 6, 10, 16)  # ids of a match, where a class of acceptance begins
_DECAY = 0.97  # of what was observed of a class, with each observation
_PRIOR = 4.0  # observations that a class begins with
_MARGIN = 1.1  # by which a draft must promise to be faster
_TIMES = 5  # of a size that are remembered
_LEAST_TIMES = 3  # of single steps, before the first draft
_STALE = 256  # passes after which a time is measured anew
_DENSEST = 16
# Of a pass of 16 rows beside one: the bytes of Mixtral's experts, and the attention between them.
_SIXTEEN = 3.5


class DraftLength:
    """Chooses the length of the next draft."""

    def __init__(self) -> None:
        self._accepted = [0.0] * (len(_MATCHES) + 1)
        self._observed = [0.0] * (len(_MATCHES) + 1)
        self._times: dict[int, deque[float]] = {}
        self._seconds: dict[int, float] = {}  # their medians
        self._timed: dict[int, int] = {}  # the pass in which a size was measured last
        self._passes = 0

    def best(self, matched: int, most: int) -> int:
        """How many ids to draft after a match of so many ids; 0: none.

        Args:
            most: ids that may be drafted.
        """
        single = self._seconds.get(1)
        if single is None or len(self._times[1]) < _LEAST_TIMES or self._is_stale(1):
            return 0
        chosen, rate = 0, _MARGIN / single
        expected = kept = 1.0
        for drafted in range(1, most + 1):
            kept *= self.acceptance(matched + drafted - 1)
            expected += kept
            if drafted + 1 in _ROWS and expected > rate * self.seconds(drafted + 1):
                chosen, rate = drafted, expected / self.seconds(drafted + 1)
        return chosen

    def observe(self, matched: int, *, accepted: bool) -> None:
        """Whether the id that followed a match of so many ids was the next one here too."""
        index = bisect_right(_MATCHES, matched)
        self._accepted[index] = _DECAY * self._accepted[index] + accepted
        self._observed[index] = _DECAY * self._observed[index] + 1

    def took(self, rows: int, seconds: float) -> None:
        """The time of a pass."""
        self._passes += 1
        times = self._times.setdefault(rows, deque(maxlen=_TIMES))
        if self._is_stale(rows):
            times.clear()
        times.append(seconds)
        self._seconds[rows], self._timed[rows] = median(times), self._passes

    def acceptance(self, matched: int) -> float:
        """The chance that the id which followed a match of so many ids follows here."""
        index = bisect_right(_MATCHES, matched)
        believed = _PRIOR * matched / (matched + 4)
        return (self._accepted[index] + believed) / (self._observed[index] + _PRIOR)

    def seconds(self, rows: int) -> float:
        """The time of a pass: measured, or by the nearest size that was."""
        if not self._is_stale(rows):
            return self._seconds[rows]
        single, slope = self._seconds[1], _SIXTEEN - 1
        measured = [size for size in _ROWS if not self._is_stale(size)]
        if measured:
            nearest = min(measured, key=lambda size: abs(size - rows))
            slope = max(self._seconds[nearest] / single - 1, 0.0) / _share(nearest)
        return single * (1 + slope * _share(rows))

    def _is_stale(self, rows: int) -> bool:
        """Whether a size was never measured, or long ago."""
        return self._passes - self._timed.get(rows, -_STALE) >= _STALE


def _share(rows: int) -> float:
    """How much of what 16 rows cost beyond one such a pass costs: experts are shared, 2 of 8."""
    return float((1 - 0.75 ** (rows - 1)) / (1 - 0.75 ** (_DENSEST - 1)))
