"""Clocks of devices: microseconds of what was enqueued. Knows nothing of what is timed."""

import time
from collections.abc import Callable
from typing import Protocol

import torch

from qmix.kernels.gpu.current_device import on


class DeviceClock(Protocol):
    """Times work on a device."""

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""

    def microseconds(self, run: Callable[[], object]) -> float:
        """The time of one run."""


class CudaClock:
    """The clock of a GPU itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        torch.cuda.synchronize(self._device)

    def microseconds(self, run: Callable[[], object]) -> float:
        """The time of one run."""
        with on(self._device):
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            run()
            end.record()
            end.synchronize()
        milliseconds: float = begin.elapsed_time(end)
        return 1000.0 * milliseconds


class HostClock:
    """The host's clock, for work on the CPU, which ends when a call returns."""

    def synchronize(self) -> None:
        """Nothing is ever pending."""

    def microseconds(self, run: Callable[[], object]) -> float:
        """The time of one run."""
        begun = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - begun)
