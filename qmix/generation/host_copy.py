"""HostCopy: values on their way from a device to the host, while the device works on.

Knows neither ids nor steps.
"""

import torch
from torch import Tensor

from qmix.kernels.gpu.current_device import on


class HostCopy:
    """A copy into pinned memory, in order with the device's work. Off a GPU it has ended at once.

    A plain copy to the host would wait for everything that was enqueued before it is asked for, the
    next step too.
    """

    def __init__(self, source: Tensor) -> None:
        """Start the copy."""
        self._ended: torch.cuda.Event | None = None
        if not source.is_cuda:
            self._values = source.clone()
            return
        with on(source.device):
            self._values = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._values.copy_(source, non_blocking=True)
            self._ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ended.record(torch.cuda.current_stream(source.device))

    def wait(self) -> Tensor:
        """The values, on the host, once the work that was enqueued before the copy has ended."""
        if self._ended is not None:
            self._ended.synchronize()
        return self._values


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Host values on a device, in order with its work, which is not waited for."""
    if device.type != "cuda":
        return values.to(device)
    with on(device):
        return values.pin_memory().to(device, non_blocking=True)
