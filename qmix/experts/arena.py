"""Memory that experts lie in, one blob each: page-aligned and pinned on the host, slots on the device.

Both are one allocation of a size fixed at the start, so nothing fragments and nothing grows. Knows
bytes only: what a blob means, and which expert lies in it, is the store's.
"""

import mmap
import warnings
from typing import Protocol

import torch
from torch import Tensor

from qmix.errors import ResourceError
from qmix.weights.blob import PAGE_BYTES, aligned

# One registration may not be larger on some drivers; 15 GB at once failed where chunks did not.
PIN_BYTES = 1 << 30
_SLOT_ALIGNMENT = 256
_PORTABLE_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


class Runtime(Protocol):
    """The two calls of CUDA's runtime that pin memory; `torch.cuda.cudart()` has them."""

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> object: ...  # noqa: N802
    def cudaHostUnregister(self, pointer: int) -> object: ...  # noqa: N802


class HostArena:
    """`blobs` blobs of `nbytes` each in host memory, each on a page of its own.

    Private anonymous memory in huge pages where the system has them; a page counts as resident once
    it is written. What is pinned can be read by the device at the same address (64-bit Linux) and
    copied without a staging buffer.

    Attributes:
        pinned_bytes: 0, or all of it. unpinned_bytes: those that should have been pinned.

    Raises:
        ResourceError: the system does not give so much memory.
    """

    def __init__(self, blobs: int, nbytes: int) -> None:
        self.stride = aligned(nbytes, PAGE_BYTES)
        self.nbytes = nbytes
        self.pinned_bytes = self.unpinned_bytes = 0
        self._runtime: Runtime | None = None
        self._count = blobs
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

    def pin(self, runtime: Runtime) -> bool:
        """Register the memory with the device, in chunks of whole blobs of at most 1 GiB together.

        A copy may not cross two registrations, so no blob does. All or nothing: after a failure the
        arena is pageable, which is said once, and counted in `unpinned_bytes`.
        """
        whole = self._count * self.stride
        chunk = max(1, PIN_BYTES // self.stride) * self.stride
        done: list[int] = []
        for start in range(0, whole, chunk):
            pointer = self._memory.data_ptr() + start
            code = _code(
                runtime.cudaHostRegister(pointer, min(chunk, whole - start), _PORTABLE_MAPPED)
            )
            if code:
                for registered in done:
                    runtime.cudaHostUnregister(registered)
                self.unpinned_bytes = whole
                warnings.warn(
                    f"host memory could not be pinned: {whole / 2**30:.2f} GiB of experts, CUDA error "
                    f"{code} after {start / 2**30:.2f} GiB. Every miss now waits for a slower copy. "
                    "Raise the limit of locked memory (ulimit -l; on WSL half of the memory can be "
                    "pinned), or give a smaller ram.",
                    stacklevel=2,
                )
                return False
            done.append(pointer)
        self._runtime, self.pinned_bytes = runtime, whole
        return True

    @property
    def pinned(self) -> bool:
        """Whether the device can read blobs where they lie."""
        return self.pinned_bytes > 0

    def unpin(self) -> None:
        """Take the registrations back. The memory itself goes with its last view."""
        if self._runtime is None:
            return
        chunk = max(1, PIN_BYTES // self.stride) * self.stride
        for start in range(0, self._count * self.stride, chunk):
            self._runtime.cudaHostUnregister(self._memory.data_ptr() + start)
        self._runtime, self.pinned_bytes = None, 0


def _code(answer: object) -> int:
    """A cudaError as a number: 0 is success."""
    return int(getattr(answer, "value", answer))  # type: ignore[call-overload, no-any-return]


class SlotArena:
    """`slots` blobs of `nbytes` in the device's memory, each aligned to 256 bytes."""

    def __init__(self, slots: int, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        stride = aligned(nbytes, _SLOT_ALIGNMENT)
        with torch.inference_mode(False):
            self._memory = torch.empty(max(slots, 1), stride, dtype=torch.uint8, device=device)
        self._count = slots

    def __len__(self) -> int:
        return self._count

    def blob(self, slot: int) -> Tensor:
        """uint8 [nbytes], a view."""
        assert 0 <= slot < self._count, slot
        return self._memory[slot, : self.nbytes]
