"""Recording launches as a CUDA graph.

Knows no model: only a function whose launches are the same each time.
"""

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

# Runs before the recording: Triton compiles and torch plans in them, which a graph cannot record.
_WARM_UP = 3

_RECORDING = Lock()  # torch records one graph at a time

Pool = Any  # of torch.cuda.graph_pool_handle, whose type has no public name


class RecordingError(Exception):
    """The launches could not be recorded, though they run."""


def record(
    launch: Callable[[], None],
    changed: Sequence[Tensor],
    generator: torch.Generator | None,
    pool: Pool | None = None,
) -> torch.cuda.CUDAGraph:
    """A graph that replays what `launch` launches on the current device.

    One thread records at a time. Other threads may use the device meanwhile.

    Args:
        launch: is called a few times before; what these calls change must not matter, or is named
            in the other arguments.
        changed: tensors that are put back after each of these calls.
        generator: that `launch` samples with; its state is put back too.
        pool: the memory that the recorded launches use; graphs that share one never run together.

    Raises:
        RecordingError: the device runs the launches and does not record them.
    """
    before = [tensor.clone() for tensor in changed]
    state = None if generator is None else generator.get_state()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            launch()
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
    torch.cuda.current_stream().wait_stream(stream)
    if generator is not None and state is not None:
        generator.set_state(state)
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    try:
        with _RECORDING, torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
            launch()
    except RuntimeError as error:
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        raise RecordingError(str(error).partition("\n")[0]) from error
    return graph
