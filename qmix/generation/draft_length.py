"""DraftLength: how many ids are worth drafting, by what was measured while the text was written.

A draft pays if a pass over it gives more ids a second than one without it. Both sides are measured:
how often the next id was the one that followed a match of such a length, whether it was drafted or
not; and the time of passes by their rows. So drafts end where they do not pay, and begin again
where the text repeats. Knows no model and no ids.
"""

from bisect import bisect_right

from qmix.generation.pass_times import PassTimes

# Rows of a pass. Few sizes, so that each is measured often.
_ROWS = (2, 4, 8, 12, 16)
_MATCHES = (0, 3, 4, 6, 10, 16)  # ids of a match, where a class of acceptance begins
_LONGEST = _MATCHES[-1]  # of longer matches no more is known
_CLASS = [bisect_right(_MATCHES, matched) - 1 for matched in range(_LONGEST + 1)]
_DECAY = 0.97  # of what was observed of a class, with each observation
_PRIOR = 4.0  # observations that a class begins with
_MARGIN = 1.1  # by which a draft must promise to be faster
_LEAST_CHANCE = 0.01  # an id less likely than this ends a draft: looking further takes time
_LEAST_TIMES = 3  # of passes without a draft, before the first one


class DraftLength:
    """Chooses the length of the next draft.

    Args:
        times: of passes; those of several texts' drafts are the same ones.
    """

    def __init__(self, times: PassTimes | None = None) -> None:
        self.times = PassTimes() if times is None else times
        self._accepted = [0.0] * len(_MATCHES)
        self._observed = [0.0] * len(_MATCHES)
        # The chance that the id which followed a match of so many ids follows here.
        self._chances = [self._acceptance(matched) for matched in range(_LONGEST + 1)]

    def best(self, matched: int, most: int, rows: int = 1, ids: float = 1.0) -> int:
        """How many ids to draft after a match of so many ids; 0: none.

        Args:
            most: ids that may be drafted.
            rows: of the pass without the draft, the newest id and other texts.
            ids: that this pass is expected to give.
        """
        if most < 1 or self.times.measured(rows) < _LEAST_TIMES:
            return 0
        chosen, rate = 0, _MARGIN * ids / self.times.seconds(rows)
        chance, chances = 1.0, self._chances
        for drafted in range(1, most + 1):
            chance *= chances[min(matched + drafted - 1, _LONGEST)]
            if chance < _LEAST_CHANCE:
                break
            ids += chance
            if rows + drafted in _ROWS:
                found = ids / self.times.seconds(rows + drafted)
                if found > rate:
                    chosen, rate = drafted, found
        return chosen

    def expected(self, matched: int, drafted: int) -> float:
        """How many ids of a draft are expected to be accepted."""
        total, chance = 0.0, 1.0
        for index in range(drafted):
            chance *= self._chances[min(matched + index, _LONGEST)]
            total += chance
        return total

    def observe(self, matched: int, *, accepted: bool) -> None:
        """Whether the id that followed a match of so many ids was the next one here too."""
        index = _CLASS[min(matched, _LONGEST)]
        self._accepted[index] = _DECAY * self._accepted[index] + accepted
        self._observed[index] = _DECAY * self._observed[index] + 1
        for of_class in range(_MATCHES[index], _LONGEST + 1):
            if _CLASS[of_class] != index:
                break
            self._chances[of_class] = self._acceptance(of_class)

    def _acceptance(self, matched: int) -> float:
        """What was observed and believed of a match."""
        index, believed = _CLASS[matched], _PRIOR * matched / (matched + 4)
        return (self._accepted[index] + believed) / (self._observed[index] + _PRIOR)
