"""Microseconds of work on a GPU, as a decode step meets it: recorded in a CUDA graph, weights not cached.

Knows nothing of what is timed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARM_UP = 3
_FEWEST, _MOST = 20, 200
_SECONDS = 0.4  # of replays, so that a slow candidate does not eat the budget


@dataclass(frozen=True)
class Timing:
    """What one call takes.

    Attributes:
        microseconds: the median. best: the least. deviation: over repetitions.
        how: `graph`, or `eager` where the work cannot be recorded because it asks the device.
        repetitions: each of all calls.
    """

    microseconds: float
    best: float
    deviation: float
    how: str
    repetitions: int


def timed(calls: Sequence[Callable[[], object]], *, record: bool = True) -> Timing:
    """The time of one of `calls`, which do the same work on weights of their own, run in turn.

    Args:
        record: False where it is known that the work asks the device.
    """
    for _ in range(_WARM_UP):
        for call in calls:
            call()
    torch.cuda.synchronize()
    run, how = _recorded(calls) if record else None, "graph"
    if run is None:
        run, how = lambda: [call() for call in calls], "eager"
    first = _events(run)
    count = int(min(_MOST, max(_FEWEST, _SECONDS / (first * 1e-6))))
    times = [_events(run) / len(calls) for _ in range(count)]
    return Timing(statistics.median(times), min(times), statistics.stdev(times), how, count)


def timed_as_is(call: Callable[[], object], repeats: int = 10) -> float:
    """Microseconds of a call in a row of `repeats`, launched as it launches itself; median of 20 rows."""

    def run() -> None:
        for _ in range(repeats):
            call()

    run()
    return statistics.median(_events(run) / repeats for _ in range(_FEWEST))


def _recorded(calls: Sequence[Callable[[], object]]) -> Callable[[], object] | None:
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


def _events(run: Callable[[], object]) -> float:
    """Microseconds of one run, by the device's own clock."""
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return 1000.0 * milliseconds
