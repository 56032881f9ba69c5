"""What the memory and the matrix units of a device can do: the bounds that speeds are divided by.

Knows nothing of models.
"""

import statistics
import time
from collections.abc import Callable

import torch

_COPIES = 10


def synchronize(device: torch.device) -> None:
    """Wait for everything that was asked of the device; on the CPU nothing is pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, to the end of what it asked of the device."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes both counted.

    The median of ten copies of `nbytes`, by default 2 GiB on a GPU and 256 MiB on a CPU: far more
    than any cache holds.
    """
    size = nbytes or (2 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.zeros(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # touches every page
    times = [seconds(lambda: target.copy_(source), device) for _ in range(_COPIES)]
    return 2 * source.nbytes / statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square product; the median of ten, on random data."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    times = [seconds(lambda: left @ right, device) for _ in range(_COPIES)]
    return 2 * size**3 / statistics.median(times)
