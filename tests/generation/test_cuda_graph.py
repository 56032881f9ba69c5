"""Recording, with fakes in the place of torch.cuda: what a failure leaves behind."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from qmix.generation import cuda_graph


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def pools(monkeypatch):
    """The pool and the error mode of every recording."""
    found = []

    @contextmanager
    def graph(_, pool, capture_error_mode):
        found.append((pool, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {}))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return found


def test_recording_is_local_to_its_thread_and_puts_back_what_the_runs_before_changed(pools):
    past, launches = torch.tensor([4]), []

    def launch():
        launches.append(int(past))
        past.add_(1)

    cuda_graph.record(launch, [past], None, pool=(1, 2))
    assert pools == [((1, 2), "thread_local")]
    assert launches == [4, 4, 4, 4]


def test_a_capture_that_fails_says_why_and_leaves_the_step_as_it_was(pools):
    past, launches = torch.tensor([4]), []

    def launch():
        launches.append(int(past))
        past.add_(1)
        if len(launches) == 4:
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with")

    with pytest.raises(cuda_graph.RecordingError, match=r"^operation not permitted when .*ing$"):
        cuda_graph.record(launch, [past], None)
    assert int(past) == 4


def test_a_launch_that_fails_by_itself_is_no_matter_of_recording(pools):
    def launch():
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side"):
        cuda_graph.record(launch, [], None)
    assert pools == []
