"""Pinned host memory by CUDA: registering it, and the address by which a device reads it.

Knows bytes only.
"""

import ctypes
import os
from contextlib import suppress
from typing import Any

import torch

from qmix.experts.arena import HostArena
from qmix.kernels.gpu.current_device import on

_PORTABLE_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class CudaMemory:
    """The calls of CUDA's runtime and driver, for the current device."""

    def __init__(self) -> None:
        self._runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]

    def register(self, pointer: int, size: int) -> int:
        """Pin memory for every device; the number of CUDA's error, 0 for none."""
        result = self._runtime.cudaHostRegister(pointer, size, _PORTABLE_MAPPED)
        return int(getattr(result, "value", result))

    def unregister(self, pointer: int) -> None:
        """Undo `register`."""
        self._runtime.cudaHostUnregister(pointer)

    def device_pointer(self, pointer: int) -> int | None:
        """Where the device reads registered memory; None: it does not, or the driver is not found.

        torch's binding of the runtime lacks this call, and the driver's does the same
        (https://docs.nvidia.com/cuda/cuda-driver-api, cuMemHostGetDevicePointer).
        """
        found = ctypes.c_uint64()
        try:
            driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
            ask = driver.cuMemHostGetDevicePointer_v2
        except (OSError, AttributeError):
            return None
        code = ask(ctypes.byref(found), ctypes.c_void_p(pointer), ctypes.c_uint(0))
        return None if code else found.value


def pin(arena: HostArena, device: torch.device, **options: Any) -> bool:
    """Pin an arena for a device; False, with a warning, if it stays pageable.

    Args:
        options: those of HostArena.pin.
    """
    with on(device):
        if arena.pin(CudaMemory(), **options):
            return True
        # The error stays in CUDA's runtime until a launch reports it: let this one do so.
        with suppress(RuntimeError):
            torch.zeros(1, device=device).add_(1)
    return False
