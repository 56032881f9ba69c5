"""Microseconds of work on a GPU as in a decode step: in a CUDA graph, with weights not cached.

Knows nothing of what is timed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARM_UP_CALLS = 3
_FEWEST_RUNS, _MOST_RUNS = 20, 200
_SECONDS = 0.4  # of runs, so that a slow candidate does not use up the budget


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


def timed(calls: Sequence[Callable[[], object]], *, record: bool = True) -> CallTiming:
    """Time one of `calls`, which do the same work on weights of their own and run in turn.

    Args:
        record: False if the work is known to wait for the device.
    """
    for _ in range(_WARM_UP_CALLS):
        for call in calls:
            call()
    torch.cuda.synchronize()
    run, how = _recorded(calls) if record else None, "graph"
    if run is None:
        run, how = lambda: [call() for call in calls], "eager"
    first = _microseconds(run)
    count = int(min(_MOST_RUNS, max(_FEWEST_RUNS, _SECONDS / (first * 1e-6))))
    times = [_microseconds(run) / len(calls) for _ in range(count)]
    return CallTiming(statistics.median(times), min(times), statistics.stdev(times), how, count)


def timed_as_is(call: Callable[[], object], repeats: int = 10) -> float:
    """Microseconds of a call that launches its own work: median of 20 rows of `repeats` calls."""

    def run() -> None:
        for _ in range(repeats):
            call()

    run()
    return statistics.median(_microseconds(run) / repeats for _ in range(_FEWEST_RUNS))


def _recorded(calls: Sequence[Callable[[], object]]) -> Callable[[], object] | None:
    """The replay of a graph of all calls; None if they cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:  # the work waits for the device
        torch.cuda.synchronize()
        return None
    graph.replay()
    return graph.replay


def _microseconds(run: Callable[[], object]) -> float:
    """The time of one run by the device's own clock."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return 1000.0 * milliseconds
