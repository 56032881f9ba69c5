"""A checkpoint's tensors in order on a device, the next two read while one is being used.

Threads read the files: on the CPU into the memory of the weights, for a GPU into buffers of pinned
memory in turn, from where the device copies. Two threads together are faster than the disk, where
one spends as long on copies from the page cache and on new memory as on waiting (evals/LOG.md).
Knows no modules.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from qmix.experts import cuda_memory
from qmix.experts.arena import HostArena
from qmix.experts.reader import Region
from qmix.formats import Checkpoint
from qmix.formats.files.shards import fresh, fresh_pages
from qmix.formats.files.spans import Together
from qmix.formats.names import ModelTensor
from qmix.kernels.gpu.current_device import on
from qmix.planning import machine
from qmix.planning.budget import READ_AHEAD
from qmix.weights.blob import aligned, expert_bytes

Read = dict[str, Tensor]
_READERS = READ_AHEAD - 1


class Upload(Protocol):
    """Copies to a device from buffers that are used in turn."""

    def buffer(self, index: int) -> Tensor:
        """uint8 [nbytes] on the host, once what was copied from it has arrived."""

    def copied(self, index: int, tensors: Read) -> Read:
        """Tensors of a buffer, or beside it, on the device; they may be on their way."""


class CudaUpload:
    """Copies from pinned memory, in order with the device's work."""

    def __init__(self, arena: HostArena, device: torch.device) -> None:
        self._arena, self._device = arena, device
        self._copied: list[torch.cuda.Event | None] = [None] * len(arena)

    @classmethod
    @contextmanager
    def opened(cls, nbytes: int, device: torch.device) -> Iterator["CudaUpload"]:
        """With buffers of so many bytes, which are freed at the end."""
        arena = HostArena([nbytes] * READ_AHEAD)
        cost = "The weights are copied to the GPU more slowly"
        cuda_memory.pin(arena, device, in_place=False, cost=cost)
        try:
            yield cls(arena, device)
        finally:
            torch.cuda.synchronize(device)
            arena.unpin()

    def buffer(self, index: int) -> Tensor:
        event = self._copied[index]
        if event is not None:
            event.synchronize()
        return self._arena.blob(index)

    def copied(self, index: int, tensors: Read) -> Read:
        with on(self._device):
            moved = {n: t.to(self._device, non_blocking=True) for n, t in tensors.items()}
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
        self._copied[index] = event
        return moved


def read_all(
    checkpoint: Checkpoint, tensors: Sequence[ModelTensor], device: torch.device
) -> Iterator[tuple[ModelTensor, Read]]:
    """The stored tensors of each weight, by name: on the device if it is built there.

    They are read through the page cache if it has room for them, so that the next load is a copy;
    if not, past it, at the disk's own rate.

    Raises:
        CheckpointError: a file is damaged.
    """
    nbytes = sum(map(checkpoint.stored_bytes, tensors))
    on_host = device.type != "cuda"
    is_kept = machine.cache_room(beside=nbytes if on_host else 0) >= nbytes
    together = None if is_kept else Together(past_cache=True)
    if on_host:
        yield from read_ahead(checkpoint, tensors, together)
        return
    with CudaUpload.opened(buffer_bytes(checkpoint, tensors), device) as upload:
        yield from read_ahead(checkpoint, tensors, together, upload)


def buffer_bytes(checkpoint: Checkpoint, tensors: Sequence[ModelTensor]) -> int:
    """What a buffer must hold: all tensors of any weight, and the pages around them."""
    return max(
        expert_bytes(aligned(checkpoint.entry(name).nbytes) for name in checkpoint.stored(tensor))
        for tensor in tensors
    )


def read_ahead(
    checkpoint: Checkpoint,
    tensors: Sequence[ModelTensor],
    together: Together | None,
    upload: Upload | None = None,
) -> Iterator[tuple[ModelTensor, Read]]:
    """`read_all`, with two threads that are a weight and two ahead.

    Args:
        together: how what lies together is read; None: each tensor is read for itself.
    """

    def uploaded(tensor: ModelTensor) -> Upload | None:
        return upload if checkpoint.built_anywhere(tensor) else None

    with ThreadPoolExecutor(_READERS, "qmix-reader") as pool:

        def start(index: int) -> Future[Read]:
            tensor = tensors[index]
            into, copies = fresh_pages if together else fresh, uploaded(tensor)
            if copies is not None:
                into = Region(copies.buffer(index % READ_AHEAD)).take
            if together is None:
                return pool.submit(checkpoint.read_all, tensor, into)
            names = checkpoint.stored(tensor)
            return pool.submit(checkpoint.read_together, names, into, together)

        ahead = deque(start(index) for index in range(min(_READERS, len(tensors))))
        for index, tensor in enumerate(tensors):
            read = ahead.popleft().result()
            if index + _READERS < len(tensors):
                ahead.append(start(index + _READERS))
            copies = uploaded(tensor)
            yield tensor, read if copies is None else copies.copied(index % READ_AHEAD, read)
