"""An expert from its checkpoint's files into a blob of memory, in the standard layouts of its weights.

What a file stores as the weight has it (bitsandbytes, compressed-tensors, dense) is read to its place;
GPTQ and AWQ are transposed beside it and copied. Knows no tiers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from qmix.formats import Checkpoint
from qmix.formats.files.shards import fresh
from qmix.formats.names import ModelTensor
from qmix.weights.blob import aligned, blob_bytes
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert
from qmix.weights.scheme import DENSE, Scheme

MatrixName = Literal["w1", "w2", "w3"]
MATRIX_NAMES: tuple[MatrixName, ...] = ("w1", "w2", "w3")
Finish = Callable[[Weight, ModelTensor], Weight]
Bundle = TypeVar("Bundle")


class Region:
    """A blob that is given out piece by piece, from its start."""

    def __init__(self, blob: Tensor) -> None:
        self._blob, self._end = blob, 0

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], the next piece."""
        start, self._end = self._end, self._end + aligned(nbytes)
        assert start + nbytes <= len(self._blob), (start, nbytes, len(self._blob))
        return self._blob[start : start + nbytes]

    def settled(self, bundle: Bundle) -> Bundle:
        """A weight whose tensors all lie in the blob: as they are if they do, else copied."""
        assert is_dataclass(bundle)
        changes: dict[str, Any] = {}
        for field in fields(bundle):
            value = getattr(bundle, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = self._kept(value)
            elif is_dataclass(value) and not isinstance(value, (type, Scheme)):
                changes[field.name] = self.settled(value)
        return replace(bundle, **changes)  # type: ignore[type-var]

    def _kept(self, tensor: Tensor) -> Tensor:
        start = self._blob.data_ptr()
        if start <= tensor.data_ptr() < start + len(self._blob):
            return tensor
        place = self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)


class ExpertReader:
    """Reads any expert of a checkpoint by its id, layer * E + expert.

    Args:
        dtype: of dense weights.
        finish: what is done with each weight that was read: its dtype, and its checks.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, finish: Finish) -> None:
        self._checkpoint, self._dtype, self._finish = checkpoint, dtype, finish
        found = [tensor for tensor in checkpoint.tensors if tensor.kind == "expert"]
        # Walking order: w1, w2, w3 of one expert after the other.
        self._tensors = [tuple(found[i : i + 3]) for i in range(0, len(found), 3)]
        for tensors in self._tensors:
            assert [t.prefix.rpartition(".")[2] for t in tensors] == list(MATRIX_NAMES)

    def __len__(self) -> int:
        return len(self._tensors)

    @cached_property
    def blob_bytes(self) -> int:
        """What the largest expert takes in memory: the size of every blob."""
        return max(sum(self._footprint(t) for t in tensors) for tensors in self._tensors)

    def file_bytes(self, expert: int) -> int:
        """Bytes that reading an expert takes from the disk."""
        return sum(self._stored(tensor) for tensor in self._tensors[expert])

    def read(self, expert: int, blob: Tensor) -> Expert:
        """The expert in a blob of `blob_bytes`: its weights are views into it.

        Raises:
            CheckpointError: the files are damaged, or changed since they were opened.
        """
        region = Region(blob)
        w1, w2, w3 = (region.settled(self._weight(t, region)) for t in self._tensors[expert])
        return Expert(w1=w1, w2=w2, w3=w3)

    def load(self, expert: int) -> Expert:
        """The expert in memory of its own."""
        w1, w2, w3 = (self._weight(tensor, None) for tensor in self._tensors[expert])
        return Expert(w1=w1, w2=w2, w3=w3)

    def described(self, expert: int) -> Expert:
        """Weights that are read from the file whenever their values are asked for."""
        w1, w2, w3 = (self._described(tensor) for tensor in self._tensors[expert])
        return Expert(w1=w1, w2=w2, w3=w3)

    def _described(self, tensor: ModelTensor) -> "FileWeight":
        packed = self._checkpoint.packing(tensor)
        return FileWeight(
            partial(self._weight, tensor, None),
            (tensor.shape[0], tensor.shape[1]),
            self._checkpoint.metadata.scheme_of(tensor, packed) if packed else DENSE,
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
        return packed.tensor_names if packed else (tensor.name,)

    def _stored(self, tensor: ModelTensor) -> int:
        return sum(self._checkpoint.entry(name).nbytes for name in self._members(tensor))

    def _footprint(self, tensor: ModelTensor) -> int:
        """Bytes of a weight in a blob, at most."""
        rows, columns = tensor.shape
        packed = self._checkpoint.packing(tensor)
        if packed is None:
            return blob_bytes((rows * columns * self._dtype.itemsize,))
        entries = {name: self._checkpoint.entry(name) for name in packed.tensor_names}
        tensors = [entry.nbytes for entry in entries.values()]
        if packed.layout == "bitsandbytes":
            return blob_bytes(tensors)
        scales = next(name for name in entries if name.endswith(("scales", "weight_scale")))
        return blob_bytes(tensors, groups=math.prod(entries[scales].shape), inputs=columns)


@dataclass(frozen=True, eq=False)
class FileWeight:
    """A weight [N, K] that lies in its file. Every use of its values reads it anew.

    Attributes:
        load: reads it, into memory of its own.
        scheme: as far as the headers tell (CheckpointMetadata.scheme_of).
        nbytes: in the file.
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
