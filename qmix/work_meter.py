"""When work of several kinds will end, from what each kind has taken so far.

A second of one kind says nothing of another: rounding a matrix and running text through it are a
hundred times apart, and which is faster depends on the machine. So each kind has a unit of its own,
a total that is known beforehand, and a rate that is measured as it goes. Knows nothing of what the
work is, and nothing of a terminal.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

# Called with (what is done now, seconds so far, seconds in all as far as one can tell).
Progress = Callable[[str, float, float], None]


class WorkMeter:
    """Counts work as it is done, and reports what is left.

    Args:
        expected: seconds that a unit of each kind takes; their ratios count until they are
            measured.
        progress: called before and after each piece of work.
    """

    def __init__(
        self,
        expected: Mapping[str, float],
        progress: Progress = lambda what, done, total: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._expected, self._progress, self._clock = expected, progress, clock
        self._begun = clock()
        self._left = dict.fromkeys(expected, 0.0)
        self._done = dict.fromkeys(expected, 0.0)
        self._seconds = dict.fromkeys(expected, 0.0)

    def plan(self, work: Mapping[str, float]) -> None:
        """There is so much work of each kind to do, besides what was planned before."""
        for kind, amount in work.items():
            self._left[kind] += amount

    def drop(self, work: Mapping[str, float]) -> None:
        """So much of what was planned will not be done."""
        for kind, amount in work.items():
            self._left[kind] = max(0.0, self._left[kind] - amount)

    @contextmanager
    def doing(self, what: str, kind: str, amount: float) -> Iterator[Callable[[float], None]]:
        """Around a piece of work that was planned; pieces do not nest.

        Yields a function that tells which share of the piece is done.
        """
        self._report(what)
        begun, before = self._clock(), (self._done[kind], self._seconds[kind], self._left[kind])

        def tell(share: float) -> None:
            done, seconds, left = before
            self._done[kind] = done + share * amount
            self._seconds[kind] = seconds + self._clock() - begun
            self._left[kind] = max(0.0, left - share * amount)
            self._report(what)

        yield tell
        tell(1.0)

    def each(
        self, what: str, kind: str, items: Iterable[Item], amount: Callable[[Item], float]
    ) -> Iterator[Item]:
        """The items; the work of each is done while the caller has it."""
        for item in items:
            with self.doing(what, kind, amount(item)):
                yield item

    @property
    def left(self) -> Mapping[str, float]:
        """The work that was planned and not done, by kind."""
        return self._left

    def _report(self, what: str) -> None:
        elapsed = self._clock() - self._begun
        self._progress(what, elapsed, elapsed + self._seconds_left(elapsed))

    def _seconds_left(self, elapsed: float) -> float:
        """By measured rates; a kind not measured yet is as much slower as the others are."""
        measured = sum(self._seconds.values())
        foreseen = sum(self._done[kind] * self._expected[kind] for kind in self._done)
        scale = measured / foreseen if foreseen else 1.0
        left = 0.0
        for kind, amount in self._left.items():
            rate = scale * self._expected[kind]
            if self._done[kind]:
                rate = self._seconds[kind] / self._done[kind]
            left += amount * rate
        # Some time passes between the pieces, and will.
        return left * max(1.0, elapsed / measured) if measured else left
