"""The memory of experts, one blob each: page-aligned and pinned on the host, slots on the device.

Each arena is one allocation whose size is fixed at the start, so that nothing fragments or grows.
Knows bytes only; the store knows what a blob means and which expert is in it.
"""

import mmap
import warnings
from typing import Protocol

import torch
from torch import Tensor

from qmix.errors import ResourceError
from qmix.weights.blob import PAGE_BYTES, aligned

# Some drivers accept no larger registration: 15 GB at once failed where chunks did not.
PIN_BYTES = 1 << 30
_SLOT_ALIGNMENT = 256


class Runtime(Protocol):
    """What CUDA offers to pin memory."""

    def register(self, pointer: int, size: int) -> int:
        """Pin memory for every device; the number of CUDA's error, 0 for none."""

    def unregister(self, pointer: int) -> None:
        """Undo `register`."""

    def device_pointer(self, pointer: int) -> int | None:
        """Where the device reads registered memory; None: it does not, or nobody knows where."""


class HostArena:
    """`blobs` blobs of `nbytes` each in host memory, each on a page of its own.

    It is private anonymous memory, in huge pages if the system has them; a page counts as resident
    once it is written. The device reads pinned memory in place, at an address that its driver tells
    (not the host's on every system), and copies it without a staging buffer.

    Attributes:
        stride: bytes from one blob to the next.
        pinned_bytes: 0, or all bytes. unpinned_bytes: bytes that should have been pinned.

    Raises:
        ResourceError: the system does not provide so much memory.
    """

    def __init__(self, blobs: int, nbytes: int) -> None:
        self.stride = aligned(nbytes, PAGE_BYTES)
        self.nbytes = nbytes
        self.pinned_bytes = self.unpinned_bytes = 0
        self._runtime: Runtime | None = None
        self._device_pointers: list[int] = []  # of each chunk
        self._count = blobs
        self._chunk = max(1, PIN_BYTES // self.stride) * self.stride
        total = max(blobs * self.stride, PAGE_BYTES)
        try:
            self._map = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ResourceError(
                "no host memory for the experts",
                expected=f"{total / 2**30:.2f} GiB",
                found=error.strerror,
                remedy="Give a smaller ram.",
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        with torch.inference_mode(False):  # threads will write into it
            self._memory = torch.frombuffer(self._map, dtype=torch.uint8)

    def __len__(self) -> int:
        return self._count

    def blob(self, index: int) -> Tensor:
        """uint8 [nbytes], a view."""
        assert 0 <= index < self._count, index
        start = index * self.stride
        return self._memory[start : start + self.nbytes]

    def pin(
        self,
        runtime: Runtime,
        *,
        in_place: bool = True,
        cost: str = "Every miss now waits for a slower copy",
    ) -> bool:
        """Register the memory with the device, in chunks of whole blobs of at most 1 GiB.

        A copy may not cross two registrations, so no blob does. If a chunk cannot be registered,
        all of the arena stays pageable: one warning says so, and `unpinned_bytes` counts it.

        Args:
            in_place: the device is to read the memory where it lies, and not only to copy it.
            cost: what it costs if that fails, for the warning.

        Returns:
            whether the arena is pinned.
        """
        whole = self._count * self.stride
        registered: list[int] = []
        device_pointers: list[int] = []
        for start in range(0, whole, self._chunk):
            pointer = self._memory.data_ptr() + start
            code = runtime.register(pointer, min(self._chunk, whole - start))
            if not code:
                registered.append(pointer)
            device_pointer: int | None = pointer
            if in_place and not code:
                device_pointer = runtime.device_pointer(pointer)
            if code or device_pointer is None:
                for earlier in registered:
                    runtime.unregister(earlier)
                self.unpinned_bytes = whole
                why = f"CUDA error {code}" if code else "no address for the device"
                warnings.warn(
                    f"host memory could not be pinned: {whole / 2**30:.2f} GiB, {why} after "
                    f"{start / 2**30:.2f} GiB. {cost}. Raise the limit of locked memory (ulimit "
                    "-l; WSL can pin half of the memory), or give a smaller ram.",
                    stacklevel=2,
                )
                return False
            device_pointers.append(device_pointer)
        self._runtime, self.pinned_bytes, self._device_pointers = runtime, whole, device_pointers
        return True

    @property
    def pinned(self) -> bool:
        """Whether the device can read the blobs in place."""
        return self.pinned_bytes > 0

    def device_address(self, index: int) -> int:
        """Where the device reads a blob: the host's own address unless the memory is pinned."""
        assert 0 <= index < self._count, index
        if not self.pinned:
            return self._memory.data_ptr() + index * self.stride
        chunk, within = divmod(index * self.stride, self._chunk)
        return self._device_pointers[chunk] + within

    def unpin(self) -> None:
        """Undo the registrations. The memory itself is freed with its last view."""
        if self._runtime is None:
            return
        for start in range(0, self._count * self.stride, self._chunk):
            self._runtime.unregister(self._memory.data_ptr() + start)
        self._runtime, self.pinned_bytes, self._device_pointers = None, 0, []


class SlotArena:
    """`slots` blobs of `nbytes` in the device's memory, each aligned to 256 bytes."""

    def __init__(self, slots: int, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self._stride = aligned(nbytes, _SLOT_ALIGNMENT)
        with torch.inference_mode(False):
            shape = (max(slots, 1), self._stride)
            self._memory = torch.empty(shape, dtype=torch.uint8, device=device)
        self._start = self._memory.data_ptr()
        self._count = slots

    def __len__(self) -> int:
        return self._count

    def blob(self, slot: int) -> Tensor:
        """uint8 [nbytes], a view."""
        assert 0 <= slot < self._count, slot
        return self._memory[slot, : self.nbytes]

    def address(self, slot: int) -> int:
        """Where a blob begins. No view is made: every token asks for every slot."""
        assert 0 <= slot < self._count, slot
        return self._start + slot * self._stride
