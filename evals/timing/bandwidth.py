"""What the memory and the matrix units of a device can do: the bounds of all speeds.

Knows nothing of models.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qmix.experts.arena import HostArena
from qmix.formats.files.large_reads import Span
from qmix.formats.files.spans import read_span

_REPETITIONS = 10
_BLOCK_BYTES, _READERS = 64 << 20, 4


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


def interconnect_bandwidth(device: torch.device) -> float:
    """Bytes a second of a copy from pinned host memory to a GPU; the median of ten."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    target.copy_(source, non_blocking=True)
    times = [
        seconds(lambda: target.copy_(source, non_blocking=True), device)
        for _ in range(_REPETITIONS)
    ]
    return source.nbytes / statistics.median(times)


def disk_bandwidth(folder: Path, nbytes: int = 512 << 20) -> float:
    """Bytes a second of reads from a file in `folder`, none of which is in the page cache.

    The file is written first and removed afterwards. It is read as experts are that stay in their
    file: past the cache where that is possible, and on several threads.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as file, ThreadPoolExecutor(_READERS) as pool:
        block, descriptor = os.urandom(_BLOCK_BYTES), file.fileno()
        for _ in range(nbytes // _BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        memory = HostArena([_BLOCK_BYTES]).blob(0).zero_()

        def spread(parts: Sequence[Callable[[], None]]) -> None:
            list(pool.map(lambda part: part(), parts))

        begun = time.perf_counter()
        for start in range(0, nbytes // _BLOCK_BYTES * _BLOCK_BYTES, _BLOCK_BYTES):
            span = Span(Path(file.name), start, start + _BLOCK_BYTES)
            read_span(span, "the file", memory, spread, past_cache=True)
        return nbytes / (time.perf_counter() - begun)


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a square matmul; the median of ten, on random data."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        left @ right
    times = [seconds(lambda: left @ right, device) for _ in range(_REPETITIONS)]
    return 2 * size**3 / statistics.median(times)
