"""Copies between host and device that run beside the device's work, with CUDA and without.

Shared by the parts of a DeviceStore. Knows bytes and order, and nothing of experts.
"""

from typing import Protocol

import torch
from torch import Tensor

from qmix.kernels.gpu.current_device import on


class PendingCopy(Protocol):
    """A copy that has been enqueued."""

    def done(self) -> bool: ...
    def join(self) -> None:
        """Order all device work that is enqueued from now on after the copy."""


class Copier(Protocol):
    """Moves bytes between host and device."""

    def follow(self) -> None:
        """Order this thread's device work after all that other threads have enqueued."""

    def copy(self, source: Tensor, target: Tensor) -> PendingCopy:
        """Start a copy that runs after all device work enqueued so far."""

    def write(self, values: Tensor, target: Tensor) -> None:
        """Copy host values to the device, in order with its work."""

    def read(self, source: Tensor) -> tuple[Tensor, PendingCopy]:
        """Copy a device tensor to the host, in order with the device's work.

        Returns:
            a host tensor, and the copy: the values are there when it is done.
        """


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        with on(stream.device):
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream)

    def done(self) -> bool:
        ended: bool = self._event.query()  # type: ignore[no-untyped-call]
        return ended

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaCopier:
    """Copies weights on a stream of its own, and tables and logs on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with on(device):
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._current = torch.cuda.current_stream(device)  # of the last step's thread

    def follow(self) -> None:
        current = torch.cuda.current_stream(self._device)
        if current != self._current:  # a thread may have chosen a stream of its own
            current.wait_stream(self._current)
            self._current = current

    def copy(self, source: Tensor, target: Tensor) -> PendingCopy:
        with on(self._device):
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                target.copy_(source, non_blocking=True)
            return _Event(self._stream)

    def write(self, values: Tensor, target: Tensor) -> None:
        with on(self._device):
            target.copy_(values.pin_memory(), non_blocking=True)

    def read(self, source: Tensor) -> tuple[Tensor, PendingCopy]:
        with on(self._device):
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            host.copy_(source, non_blocking=True)
            return host, _Event(torch.cuda.current_stream(self._device))


class FinishedCopy:
    """A copy that ended before it was returned."""

    def done(self) -> bool:
        return True

    def join(self) -> None:
        pass


class HostCopier:
    """Copies at once, where host memory stands in for the device's."""

    def follow(self) -> None:
        pass

    def copy(self, source: Tensor, target: Tensor) -> PendingCopy:
        target.copy_(source)
        return FinishedCopy()

    def write(self, values: Tensor, target: Tensor) -> None:
        target.copy_(values)

    def read(self, source: Tensor) -> tuple[Tensor, PendingCopy]:
        return source.clone(), FinishedCopy()
