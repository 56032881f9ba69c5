"""The CUDA device that launches, streams, graphs and pinned memory belong to: their tensors'.

CUDA and Triton take the thread's current device, whatever device a tensor lies on. Knows no kernel.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one within the block; other devices need nothing."""
    if device.type != "cuda" or device.index is None:
        return nullcontext()
    if device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
