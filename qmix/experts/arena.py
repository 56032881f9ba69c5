"""The memory of experts, one blob each: page-aligned and pinned on the host, slots on the device.

Each arena is one allocation whose size is fixed at the start, so that nothing fragments or grows.
Knows bytes only; the store knows what a blob means and which expert is in it.
"""

import mmap
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
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
    """Blobs of these sizes in host memory, each on pages of its own.

    It is private anonymous memory, in huge pages if the system has them; a page counts as resident
    once it is written. The device reads pinned memory in place, at an address that its driver tells
    (not the host's on every system), and copies it without a staging buffer.

    Attributes:
        nbytes: of the largest blob.
        pinned_bytes: 0, or all bytes. unpinned_bytes: bytes that should have been pinned.

    Raises:
        ResourceError: the system does not provide so much memory.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes, self.nbytes = tuple(sizes), max(sizes, default=0)
        self._starts = [0, *accumulate(aligned(size, PAGE_BYTES) for size in sizes)]
        self.pinned_bytes = self.unpinned_bytes = 0
        self._runtime: Runtime | None = None
        self._chunks = self._whole_blobs()
        self._device_pointers: list[int] = []  # of each chunk
        total = max(self._starts[-1], PAGE_BYTES)
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
        return len(self._sizes)

    def _whole_blobs(self) -> list[int]:
        """Where chunks begin, and where the last one ends: whole blobs, at most PIN_BYTES."""
        chunks = [0]
        if not self._sizes:
            return chunks
        for start, end in pairwise(self._starts):
            if end - chunks[-1] > PIN_BYTES and start > chunks[-1]:
                chunks.append(start)
        return [*chunks, self._starts[-1]]

    def blob(self, index: int) -> Tensor:
        """uint8 [size], a view."""
        assert 0 <= index < len(self), index
        start = self._starts[index]
        return self._memory[start : start + self._sizes[index]]

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
        whole = self._starts[-1]
        registered: list[int] = []
        device_pointers: list[int] = []
        for start, end in pairwise(self._chunks):
            pointer = self._memory.data_ptr() + start
            code = runtime.register(pointer, end - start)
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
        assert 0 <= index < len(self), index
        start = self._starts[index]
        if not self.pinned:
            return self._memory.data_ptr() + start
        chunk = bisect_right(self._chunks, start, hi=len(self._device_pointers)) - 1
        return self._device_pointers[chunk] + start - self._chunks[chunk]

    def unpin(self) -> None:
        """Undo the registrations. The memory itself is freed with its last view."""
        if self._runtime is None:
            return
        for start in self._chunks[:-1]:
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
