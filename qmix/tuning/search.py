"""A search along axes: what is measured faster, and computes the same, is kept.

Knows nothing of what is measured. A candidate that raises, or whose result differs, never wins.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", bound=Hashable)
Candidate = TypeVar("Candidate", contravariant=True)

# Relative to the norm of what is expected. Sums in another order differ by under 0.01;
# what misses a tile or a head differs by far more.
LARGEST_DIFFERENCE = 0.02
# What is kept must be faster by more than two runs of the same differ.
_GAIN = 0.99
_USUAL_SECONDS = 2.0  # of a trial: mostly the compiler's


@dataclass(frozen=True)
class Outcome:
    """What a candidate took, and how far its result is from what is expected."""

    microseconds: float
    difference: float


class Trials(Protocol[Candidate]):
    """Runs candidates."""

    def prepare(self, candidates: Sequence[Candidate]) -> None:
        """Whatever may be done for several candidates at once; none of them is measured."""

    def measure(self, candidate: Candidate) -> Outcome:
        """Run one; whatever it raises speaks against it."""


class DeviceLostError(Exception):
    """After this candidate nothing can be measured any more; the cause says why."""


class Search(Generic[T]):
    """A search that may be ended at any time: `best` is always what was found so far.

    Args:
        starts: the first of them that is right is what others are compared with.
        axes: each gives other candidates near one, in the order in which they are tried.
        seconds: no trial begins that would probably end later.
        clock: in seconds.
        on_trial: called before each trial with the seconds that have passed.

    Attributes:
        start: what the gain is over.
        best: the fastest candidate whose result was right.
        outcomes: of all that were right.
        rejected: why the others were not.
    """

    def __init__(
        self,
        starts: Sequence[T],
        axes: Sequence[Callable[[T], Sequence[T]]],
        trials: Trials[T],
        *,
        seconds: float,
        clock: Callable[[], float],
        on_trial: Callable[[float], None] = lambda passed: None,
    ) -> None:
        self.start = self.best = starts[0]
        self._starts = starts
        self.outcomes: dict[T, Outcome] = {}
        self.rejected: dict[T, str] = {}
        self._axes, self._trials, self._on_trial = axes, trials, on_trial
        self._clock, self._begun, self._seconds = clock, clock(), seconds
        self._longest = self._preparation = 0.0  # seconds of a trial, and of preparing some

    def run(self) -> None:
        """Search until the axes give nothing better, or the time is over.

        Raises:
            DeviceLostError: a candidate took the device with it. `best` was found before.
        """
        for start in self._starts:
            self.start = self.best = start
            if self._try(start):
                break
        else:
            self.start = self.best = self._starts[0]
            return
        # The first trial compiles what all others share.
        self._longest = min(self._longest, _USUAL_SECONDS)
        for axis in self._axes:
            candidates = [each for each in axis(self.best) if not self._is_known(each)]
            if not candidates or not self._has_time(self._preparation):
                continue
            begun = self._clock()
            self._trials.prepare(candidates)
            self._preparation = max(self._preparation, self._clock() - begun)
            for candidate in candidates:
                if self._has_time() and self._try(candidate):
                    self._keep(candidate)
        self._confirm()

    @property
    def gain(self) -> float:
        """By how much the best is faster than the start, as a part of the start's time."""
        if self.best not in self.outcomes:
            return 0.0
        return 1.0 - self._microseconds(self.best) / self._microseconds(self.start)

    def _is_known(self, candidate: T) -> bool:
        return candidate in self.outcomes or candidate in self.rejected

    def _microseconds(self, candidate: T) -> float:
        return self.outcomes[candidate].microseconds

    def _has_time(self, more: float = 0.0) -> bool:
        return self._clock() - self._begun + self._longest + more < self._seconds

    def _keep(self, candidate: T) -> None:
        if self._microseconds(candidate) < _GAIN * self._microseconds(self.best):
            self.best = candidate

    def _confirm(self) -> None:
        """Measure start and best again, beside each other: clocks and heat change meanwhile."""
        found = self.best
        if found == self.start or not self._has_time():
            return
        if not self._try(self.start) or not self._try(found) or self.gain <= 1.0 - _GAIN:
            self.best = self.start

    def _try(self, candidate: T) -> bool:
        """Whether the candidate's result is right; its time is in `outcomes` then."""
        begun = self._clock()
        self._on_trial(begun - self._begun)
        self.outcomes.pop(candidate, None)
        try:
            outcome = self._trials.measure(candidate)
        except DeviceLostError as error:
            self.rejected[candidate] = _said(error.__cause__ or error)
            raise
        except Exception as error:  # noqa: BLE001 - a compiler, a driver or a launch may raise anything
            self.rejected[candidate] = _said(error)
            return False
        self._longest = max(self._longest, self._clock() - begun)
        if not outcome.difference <= LARGEST_DIFFERENCE:  # not a number either
            self.rejected[candidate] = f"another result: {outcome.difference:.3g} of its norm"
            return False
        if not 0 < outcome.microseconds < float("inf"):
            self.rejected[candidate] = f"{outcome.microseconds} us"
            return False
        self.outcomes[candidate] = outcome
        return True


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
