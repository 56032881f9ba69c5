"""What the launchers of Triton kernels share: sizes of grids and blocks. Knows no kernel."""

from functools import cache

import torch


def power_of_2(count: int) -> int:
    """The smallest power of 2 that is at least `count`."""
    return 1 << (count - 1).bit_length()


@cache
def multiprocessors(device: torch.device, *, interpreted: int) -> int:
    """The multiprocessors of a GPU; `interpreted` stands for them in the interpreter."""
    if device.type != "cuda":
        return interpreted
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
