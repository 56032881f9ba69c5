"""Microseconds of work on a GPU as in a decode step: in a CUDA graph, with weights not cached.

Knows nothing of what is timed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qmix.tuning.device_clock import CudaClock, DeviceClock, HostClock

_SECONDS = 0.4  # of runs, so that a slow candidate does not use up the budget

Calls = Sequence[Callable[[], object]]


class Clock(DeviceClock, Protocol):
    """Times work on a device.

    Attributes:
        warm_ups: calls that do not count.
        fewest, most: runs that count.
    """

    warm_ups: int
    fewest: int
    most: int

    def recorded(self, calls: Calls) -> Callable[[], object] | None:
        """The replay of a graph of all calls; None if they cannot be recorded."""


class GraphClock(CudaClock):
    """The clock of the current GPU, and graphs on it."""

    warm_ups, fewest, most = 3, 20, 200

    def recorded(self, calls: Calls) -> Callable[[], object] | None:
        """The replay of a graph of all calls; None if they wait for the device."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError:
            torch.cuda.synchronize()
            return None
        graph.replay()
        return graph.replay


class RehearsalClock(HostClock):
    """The host's clock, and few runs: what is timed says nothing."""

    warm_ups, fewest, most = 0, 2, 2

    def recorded(self, calls: Calls) -> Callable[[], object] | None:
        """There are no graphs."""
        return None


CUDA_CLOCK: Clock = GraphClock(torch.device("cuda"))  # the current one
HOST_CLOCK: Clock = RehearsalClock()


@dataclass(frozen=True)
class CallTiming:
    """What one call takes.

    Attributes:
        microseconds: the median.
        best: the least.
        deviation: standard deviation over the repetitions.
        how: `graph`, or `eager` where the work cannot be recorded because it waits for the device.
        repetitions: number of runs of all calls.
    """

    microseconds: float
    best: float
    deviation: float
    how: str
    repetitions: int


def timed(calls: Calls, clock: Clock = CUDA_CLOCK, *, record: bool = True) -> CallTiming:
    """Time one of `calls`, which do the same work on weights of their own and run in turn.

    Args:
        record: False if the work is known to wait for the device.
    """
    for _ in range(clock.warm_ups):
        for call in calls:
            call()
    clock.synchronize()
    run, how = clock.recorded(calls) if record else None, "graph"
    if run is None:
        run, how = lambda: [call() for call in calls], "eager"
    first = clock.microseconds(run)
    count = int(min(clock.most, max(clock.fewest, _SECONDS / (first * 1e-6))))
    times = [clock.microseconds(run) / len(calls) for _ in range(count)]
    return CallTiming(statistics.median(times), min(times), statistics.stdev(times), how, count)


def timed_as_is(call: Callable[[], object], clock: Clock = CUDA_CLOCK, repeats: int = 10) -> float:
    """Microseconds of a call that launches its own work: the median of rows of `repeats` calls."""

    def run() -> None:
        for _ in range(repeats):
            call()

    run()
    return statistics.median(clock.microseconds(run) / repeats for _ in range(clock.fewest))
