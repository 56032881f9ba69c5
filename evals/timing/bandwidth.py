"""What the memory and the matrix units of a device can do: the bounds of all speeds.

Knows nothing of models.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

_REPETITIONS = 10
_BLOCK_BYTES = 16 << 20


def synchronize(device: torch.device) -> None:
    """Wait for everything that was enqueued on the device; on the CPU nothing is pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, until the device has finished what it enqueued."""
    synchronize(device)
    begun = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begun


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes a second of a copy within the device's memory; bytes read and bytes written both count.

    The median of ten copies of `nbytes`. The default of 2 GiB on a GPU and 256 MiB on a CPU is far
    more than any cache holds.
    """
    size = nbytes or (2 << 30 if device.type == "cuda" else 256 << 20)
    source = torch.zeros(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # touches every page
    times = [seconds(lambda: target.copy_(source), device) for _ in range(_REPETITIONS)]
    return 2 * source.nbytes / statistics.median(times)


def read_bandwidth(device: torch.device, nbytes: int = 512 << 20) -> float:
    """Bytes a second that all threads read from the device's memory: the fastest of ten sums.

    The fastest, because a plan needs what the memory can do, whatever else ran meanwhile.
    """
    source = torch.zeros(nbytes // 4, device=device)
    source.sum()
    return source.nbytes / min(seconds(source.sum, device) for _ in range(_REPETITIONS))


def interconnect_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes a second of a copy from pinned host memory to a GPU; the median of ten."""
    source = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target.copy_(source, non_blocking=True)
    times = [
        seconds(lambda: target.copy_(source, non_blocking=True), device)
        for _ in range(_REPETITIONS)
    ]
    return nbytes / statistics.median(times)


def disk_bandwidth(folder: Path, nbytes: int = 512 << 20) -> float:
    """Bytes a second of reads from a file in `folder`, none of which is in the page cache.

    The file is written first and removed afterwards. Each read has 16 MiB, as an expert's tensors
    do.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        block, descriptor = os.urandom(_BLOCK_BYTES), file.fileno()
        for _ in range(nbytes // _BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        buffer = bytearray(_BLOCK_BYTES)
        begun = time.perf_counter()
        for start in range(0, nbytes // _BLOCK_BYTES * _BLOCK_BYTES, _BLOCK_BYTES):
            os.preadv(descriptor, [buffer], start)
        return nbytes / (time.perf_counter() - begun)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square matmul; the median of ten, on random data."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    times = [seconds(lambda: left @ right, device) for _ in range(_REPETITIONS)]
    return 2 * size**3 / statistics.median(times)
