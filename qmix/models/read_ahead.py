"""A checkpoint's tensors in order on a device, each read while the one before is being used.

A thread reads the files into two buffers of pinned memory in turn, from where the device copies.
Knows no modules.
"""

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
from qmix.formats.files.shards import fresh
from qmix.formats.names import ModelTensor
from qmix.kernels.gpu.current_device import on
from qmix.planning.budget import READ_AHEAD
from qmix.weights.blob import aligned

Read = dict[str, Tensor]


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
        arena = HostArena(READ_AHEAD, nbytes)
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

    Raises:
        CheckpointError: a file is damaged.
    """
    if device.type != "cuda":
        for tensor in tensors:
            yield tensor, checkpoint.read_all(tensor)
        return
    with CudaUpload.opened(buffer_bytes(checkpoint, tensors), device) as upload:
        yield from read_ahead(checkpoint, tensors, upload)


def buffer_bytes(checkpoint: Checkpoint, tensors: Sequence[ModelTensor]) -> int:
    """What a buffer must hold: all tensors of any weight."""
    return max(
        sum(aligned(checkpoint.entry(name).nbytes) for name in checkpoint.stored(tensor))
        for tensor in tensors
    )


def read_ahead(
    checkpoint: Checkpoint, tensors: Sequence[ModelTensor], upload: Upload
) -> Iterator[tuple[ModelTensor, Read]]:
    """`read_all`, with a thread that is one weight ahead."""
    with ThreadPoolExecutor(1, "qmix-reader") as pool:

        def start(index: int) -> Future[Read]:
            tensor = tensors[index]
            into = fresh
            if checkpoint.built_anywhere(tensor):
                into = Region(upload.buffer(index % READ_AHEAD)).take
            return pool.submit(checkpoint.read_all, tensor, into)

        ahead = start(0)
        for index, tensor in enumerate(tensors):
            read = ahead.result()
            if index + 1 < len(tensors):
                ahead = start(index + 1)
            if checkpoint.built_anywhere(tensor):
                read = upload.copied(index % READ_AHEAD, read)
            yield tensor, read
