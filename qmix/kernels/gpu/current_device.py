"""The CUDA device that launches, streams, graphs and pinned memory belong to: their tensors'.

CUDA and Triton take the thread's current device, whatever device a tensor lies on. Knows no kernel.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one within the block; other devices need nothing."""
    if device.type != "cuda" or device.index is None:
        return nullcontext()
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Let a thread's work on a CUDA device within the block run beside what others enqueue later.

    It follows all that was enqueued before. Other devices need nothing.
    """
    if device.type != "cuda":
        yield
        return
    with on(device):
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.default_stream(device))
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
