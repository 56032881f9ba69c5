"""Safetensors files: a reader of one file or of shards with an index, a streaming writer.

Reads by pread into fresh memory, so a truncated file is an error and never a signal, and resident
memory is what was asked for. Knows nothing of models: only names, dtypes, shapes and bytes.
Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data).
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.formats.files import safetensors_header
from qmix.formats.files.safetensors_header import TensorInfo, open_regular
from qmix.formats.files.shard_names import INDEX, shard_name

_ALIGNMENT = 8

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, spelled) for name, (spelled, _) in safetensors_header.DTYPES.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


Allocate = Callable[[int], Tensor]


def fresh(nbytes: int) -> Tensor:
    """Memory of its own: uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, stop) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def rows(self, first: int, last: int) -> "Entry":
        """Rows [first, last) along the first axis, which lie together."""
        row_bytes = self.nbytes // self.shape[0]
        start = self.start + first * row_bytes
        shape = (last - first, *self.shape[1:])
        return Entry(self.file, self.dtype, shape, start, start + shape[0] * row_bytes)


@dataclass(frozen=True)
class Shards:
    """All tensors of a directory, by their names in the files."""

    directory: Path
    entries: Mapping[str, Entry]

    @classmethod
    def of(cls, directory: Path, found: Mapping[str, TensorInfo]) -> "Shards":
        """From the headers of its files."""
        return cls(directory, {name: _entry(header) for name, header in found.items()})

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def read(self, name: str, into: Allocate = fresh) -> Tensor:
        """One tensor by its name in the files; see read_entry."""
        return read_entry(name, self.entries[name], into)


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; see headers.read_header."""
    return {name: _entry(header) for name, header in safetensors_header.read_header(path).items()}


def _entry(header: TensorInfo) -> Entry:
    return Entry(header.file, DTYPES[header.dtype], header.shape, header.start, header.stop)


def read_entry(name: str, entry: Entry, into: Allocate = fresh) -> Tensor:
    """Read a tensor, by default into fresh memory.

    Args:
        name: the tensor's, for errors.
        into: returns memory of the given number of bytes, uint8 on the CPU.

    Raises:
        CheckpointError: the file is gone, or ends before the tensor does.
    """
    data = into(entry.nbytes)
    if entry.nbytes:
        nbytes = _read_into(entry, data.numpy().data)
        if nbytes != entry.nbytes:
            raise CheckpointError(
                f"the data of {name} ends early",
                where=str(entry.file),
                expected=f"{entry.nbytes} B",
                found=f"{nbytes} B",
                remedy="The file changed while it was read, or is still being written.",
            )
    return data.view(entry.dtype).view(entry.shape)


def _read_into(entry: Entry, view: memoryview) -> int:
    """Fill `view` from the file; returns the bytes read, short only at the file's end."""
    done = 0
    with open_regular(entry.file) as file:
        while done < entry.nbytes:  # one call reads at most 2 GiB
            got = os.preadv(file.fileno(), [view[done:]], entry.start + done)
            if got == 0:
                break
            done += got
    return done


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its name, dtype and shape (or an upper bound of it)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """One safetensors file, written tensor by tensor without holding any.

    Space for the header is reserved from the plan and filled in at `close`; data follows in the
    order of writing. Tensors whose size would misalign the next one are few and small (quantization
    states); they are kept and written last. The same tensors give the same bytes on any machine.
    """

    def __init__(self, path: Path, planned: Sequence[Planned]) -> None:
        self.path = path
        self._planned = {tensor.name: tensor for tensor in planned}
        self._offsets: dict[str, tuple[str, list[int], int, int]] = {}
        self._deferred: dict[str, Tensor] = {}
        self._end = 0
        bound = {
            tensor.name: (_NAMES[tensor.dtype], list(tensor.shape), 1 << 48, 1 << 48)
            for tensor in planned
        }
        self._reserved = -(-(8 + len(_header(bound))) // _ALIGNMENT) * _ALIGNMENT - 8
        self._file = path.open("xb")
        self._file.seek(8 + self._reserved)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append one tensor of the plan."""
        planned = self._planned[name]
        assert tensor.dtype == planned.dtype, name
        assert tensor.nbytes <= planned.nbytes, name
        if tensor.nbytes % _ALIGNMENT:
            self._deferred[name] = tensor
        else:
            self._append(name, tensor)

    def close(self) -> None:
        """Write the deferred tensors and the header, and force all to the disk."""
        for name, tensor in sorted(
            self._deferred.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
        ):
            self._append(name, tensor)
        assert self._offsets.keys() == self._planned.keys(), "every planned tensor is written"
        header = _header(self._offsets)
        self._file.seek(0)
        self._file.write(self._reserved.to_bytes(8, "little"))
        self._file.write(header.ljust(self._reserved))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _append(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        if data.nbytes:
            self._file.write(data.view(-1).view(torch.uint8).numpy().data)
        start, self._end = self._end, self._end + data.nbytes
        self._offsets[name] = (_NAMES[data.dtype], list(data.shape), start, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _header(offsets: Mapping[str, tuple[str, list[int], int, int]]) -> bytes:
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, start, stop) in offsets.items():
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    return json.dumps(document, separators=(",", ":")).encode()


def write_shards(
    folder: Path,
    groups: Sequence[Sequence[Planned]],
    tensors: Iterable[Mapping[str, Tensor]],
    max_bytes: int,
) -> None:
    """Write shards with the hub's names and their index, holding one group of tensors at a time.

    Args:
        groups: the plan; a group (one weight's codes and scales) stays in one shard.
        tensors: the tensors of each group, in the same order, by name.
        max_bytes: of a shard; a group larger than that gets a shard of its own.
    """
    shards = cut(groups, max_bytes)
    stream = iter(tensors)
    weight_map: dict[str, str] = {}
    total = 0
    for index, shard in enumerate(shards):
        name = shard_name(index, len(shards))
        with ShardWriter(folder / name, [tensor for group in shard for tensor in group]) as writer:
            for group in shard:
                values = next(stream)
                for planned in group:
                    writer.write(planned.name, values[planned.name])
                    weight_map[planned.name] = name
                    total += values[planned.name].nbytes
                del values  # or it would be held while the next group is made
    write_index(folder, weight_map, total)


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of shards: which file holds each tensor."""
    document = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    strict_json.write(folder / INDEX, document)


def cut(groups: Sequence[Sequence[Planned]], max_bytes: int) -> list[list[Sequence[Planned]]]:
    """Distribute groups over shards of at most `max_bytes`, in order."""
    shards: list[list[Sequence[Planned]]] = [[]]
    filled = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(group)
        filled += size
    return shards
