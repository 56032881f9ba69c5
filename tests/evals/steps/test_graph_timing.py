"""Work is timed by the device's own clock, in a graph where it can be recorded."""

import pytest
import torch

from qmix.evals.steps import graph_timing
from qmix.evals.steps.graph_timing import HOST_CLOCK


class Clock:
    """Stands for CUDA: a run of two calls takes 500 us; recording can be refused."""

    def __init__(self, monkeypatch, records):
        self.replays, self.records = 0, records
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                pass

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 0.5  # two calls

        class Graph:
            def replay(self):
                clock.replays += 1

        class Recording:
            def __init__(self, graph):
                pass

            def __enter__(self):
                if not clock.records:
                    raise RuntimeError("operation not permitted when stream is capturing")

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


@pytest.mark.parametrize("records", [True, False])
def test_work_is_timed_in_a_graph_where_it_can_be_recorded(monkeypatch, records):
    clock, called = Clock(monkeypatch, records), []
    calls = [lambda: called.append(0), lambda: called.append(1)]
    took = graph_timing.timed(calls)
    assert (took.microseconds, took.deviation, took.repetitions) == (250.0, 0.0, 200)
    assert took.how == ("graph" if records else "eager")
    assert clock.replays == (202 if records else 0)
    assert called.count(0) == called.count(1) == (4 if records else 3 + 201)
    assert graph_timing.timed(calls, record=False).how == "eager"
    assert graph_timing.timed_as_is(calls[0]) == 50.0


def test_on_the_host_nothing_is_recorded():
    called = []
    took = graph_timing.timed([lambda: called.append(0)], HOST_CLOCK)
    assert took.how == "eager"
    assert took.microseconds > 0
    assert len(called) == 3
