"""Reads an expert from its checkpoint's files into a blob of memory, in standard layouts.

Layouts that store a tensor as the weight holds it (bitsandbytes, compressed-tensors, dense) are
read straight into the blob, and what lies together in the file is read together: an expert that
qmix has written is one read. GPTQ and AWQ are transposed beside the blob and copied. Knows no
tiers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from qmix.formats import Checkpoint
from qmix.formats.files.shards import fresh
from qmix.formats.files.spans import Spread, Together, in_turn
from qmix.formats.layouts.unpacking import as_stored
from qmix.formats.names import ModelTensor
from qmix.weights.blob import aligned, blob_bytes, expert_bytes, quantized_bytes
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert
from qmix.weights.scheme import DENSE, Scheme

MatrixName = Literal["w1", "w2", "w3"]
MATRIX_NAMES: tuple[MatrixName, ...] = ("w1", "w2", "w3")
Finish = Callable[[Weight, ModelTensor], Weight]
Bundle = TypeVar("Bundle")


class Region:
    """A blob that is handed out piece by piece, from its start."""

    def __init__(self, blob: Tensor) -> None:
        self._blob, self._end = blob, 0

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], the next piece."""
        start, self._end = self._end, self._end + aligned(nbytes)
        assert start + nbytes <= len(self._blob), (start, nbytes, len(self._blob))
        return self._blob[start : start + nbytes]

    def moved_in(self, bundle: Bundle) -> Bundle:
        """The same weight, all of its tensors in the blob: those outside are copied into it."""
        assert is_dataclass(bundle)
        changes: dict[str, Any] = {}
        for field in fields(bundle):
            value = getattr(bundle, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = self._inside(value)
            elif is_dataclass(value) and not isinstance(value, (type, Scheme)):
                changes[field.name] = self.moved_in(value)
        return replace(bundle, **changes)  # type: ignore[type-var]

    def _inside(self, tensor: Tensor) -> Tensor:
        start = self._blob.data_ptr()
        if start <= tensor.data_ptr() < start + len(self._blob):
            return tensor
        piece = self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return piece.copy_(tensor)


class ExpertReader:
    """Reads any expert of a checkpoint by its id, layer * E + expert.

    Args:
        dtype: of dense weights.
        finish: brings each weight that was read into its dtype, and checks it.

    Attributes:
        cached_share: the share of experts that the page cache is to keep, of 1. What it does not
            hold of the others is read past it.
        apart: read each tensor for itself and through the cache.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, finish: Finish) -> None:
        self._checkpoint, self._dtype, self._finish = checkpoint, dtype, finish
        self.cached_share, self.apart = 1.0, False
        experts = [tensor for tensor in checkpoint.tensors if tensor.kind == "expert"]
        # They come expert by expert, as w1, w2 and w3.
        self._tensors = [tuple(experts[i : i + 3]) for i in range(0, len(experts), 3)]
        for tensors in self._tensors:
            assert [t.prefix.rpartition(".")[2] for t in tensors] == list(MATRIX_NAMES)

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def blob_bytes(self) -> int:
        """Bytes of the largest expert in memory, the size of every blob."""
        return max(expert_bytes(self._footprint(t) for t in tensors) for tensors in self._tensors)

    def file_bytes(self, expert: int) -> int:
        """Bytes that are read from the disk for an expert."""
        return sum(self._stored(tensor) for tensor in self._tensors[expert])

    def is_past_cache(self, expert: int) -> bool:
        """Whether it is not among those of the cache, which are spread evenly."""
        return int((expert + 1) * self.cached_share) == int(expert * self.cached_share)

    def read(self, expert: int, blob: Tensor, spread: Spread = in_turn) -> Expert:
        """Read an expert into a blob of `blob_bytes`; its weights are views of the blob.

        Args:
            spread: does the parts of the read, and waits for all of them.

        Raises:
            CheckpointError: the files are damaged, or changed since they were opened.
        """
        region, names = Region(blob), self._stored_names(expert)
        if names is None:
            weights = [region.moved_in(self._weight(t, region)) for t in self._tensors[expert]]
        else:
            together = Together(spread, self.is_past_cache(expert))
            stored = self._checkpoint.read_together(names, region.take, together)
            weights = [
                self._finish(self._checkpoint.built(t, stored), t) for t in self._tensors[expert]
            ]
            weights = [region.moved_in(weight) for weight in weights]
        w1, w2, w3 = weights
        return Expert(w1=w1, w2=w2, w3=w3)

    def _stored_names(self, expert: int) -> list[str] | None:
        """The tensors of an expert that may be read together; None if it is not kept as stored."""
        tensors = self._tensors[expert]
        if self.apart or not all(map(self._is_as_stored, tensors)):
            return None
        return [name for tensor in tensors for name in self._checkpoint.stored(tensor)]

    def _is_as_stored(self, tensor: ModelTensor) -> bool:
        packed = self._checkpoint.packing(tensor)
        return self._entry_dtype(tensor) == self._dtype if packed is None else as_stored(packed)

    def load(self, expert: int) -> Expert:
        """Read an expert into memory of its own."""
        w1, w2, w3 = (self._weight(tensor, None) for tensor in self._tensors[expert])
        return Expert(w1=w1, w2=w2, w3=w3)

    def kinds(self) -> Iterator[Weight]:
        """A weight of each scheme and shape, read when it is asked for."""
        found: dict[tuple[Scheme, tuple[int, int]], FileWeight] = {}
        for tensors in self._tensors:
            for weight in map(self._described, tensors):
                found.setdefault((weight.scheme, weight.shape), weight)
        return (weight.load() for weight in found.values())

    def described(self, expert: int) -> Expert:
        """An expert whose weights are read from the file whenever their values are needed."""
        w1, w2, w3 = (self._described(tensor) for tensor in self._tensors[expert])
        return Expert(w1=w1, w2=w2, w3=w3)

    def _described(self, tensor: ModelTensor) -> "FileWeight":
        packed = self._checkpoint.packing(tensor)
        return FileWeight(
            partial(self._weight, tensor, None),
            (tensor.shape[0], tensor.shape[1]),
            self._checkpoint.metadata.scheme_of(packed) if packed else DENSE,
            self._dtype,
            self._stored(tensor),
        )

    def _weight(self, tensor: ModelTensor, region: Region | None) -> Weight:
        packed = self._checkpoint.packing(tensor)
        as_stored = packed is not None or self._entry_dtype(tensor) == self._dtype
        into = region.take if region is not None and as_stored else fresh
        return self._finish(self._checkpoint.weight(tensor, into), tensor)

    def _entry_dtype(self, tensor: ModelTensor) -> torch.dtype:
        return self._checkpoint.entry(tensor.name).dtype

    def _members(self, tensor: ModelTensor) -> tuple[str, ...]:
        packed = self._checkpoint.packing(tensor)
        return packed.names if packed else (tensor.name,)

    def _stored(self, tensor: ModelTensor) -> int:
        return sum(self._checkpoint.entry(name).nbytes for name in self._members(tensor))

    def _footprint(self, tensor: ModelTensor) -> int:
        """The most bytes that a weight takes in a blob."""
        rows, columns = tensor.shape
        packed = self._checkpoint.packing(tensor)
        if packed is None or packed.dense:
            return blob_bytes((rows * columns * self._dtype.itemsize,))
        scheme = self._checkpoint.metadata.scheme_of(packed)
        tensors = [self._checkpoint.entry(name).nbytes for name in packed.names]
        return quantized_bytes(scheme, tensor.shape, tensors)


@dataclass(frozen=True, eq=False)
class FileWeight:
    """A weight [N, K] in its file. Every use of its values reads it again.

    Attributes:
        load: reads the weight into memory of its own.
        scheme: as far as the headers say (CheckpointMetadata.scheme_of).
        nbytes: of its tensors in the file.
    """

    load: Callable[[], Weight]
    shape: tuple[int, int]
    scheme: Scheme
    dtype: torch.dtype
    nbytes: int

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [start, stop) as [stop - start, K]."""
        return self.load().rows(start, stop, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight [N, K]."""
        return self.load().dequantize(dtype)

    def to(self, device: torch.device) -> Weight:
        """Itself on the CPU; elsewhere the weight."""
        return self if device == self.device else self.load().to(device)
