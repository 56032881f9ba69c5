"""Reading tensors from files, one file or many shards.

Bytes are read by pread into fresh or given memory: a file that shrinks is an error and never a
signal, and the process holds nothing but what it asked for. Knows nothing of models.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.files.regular_file import open_regular
from qmix.formats.files import safetensors_header
from qmix.formats.files.safetensors_header import TensorInfo
from qmix.weights import huge_pages
from qmix.weights.blob import PAGE_BYTES, TOGETHER_BYTES
from qmix.weights.dense import all_finite

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, (torch_name, _) in safetensors_header.DTYPES.items()
}

Allocate = Callable[[int], Tensor]


def fresh(nbytes: int) -> Tensor:
    """New memory: uint8 [nbytes]."""
    memory = torch.empty(nbytes, dtype=torch.uint8)
    huge_pages.ask(memory)
    return memory


def fresh_pages(nbytes: int) -> Tensor:
    """New memory that begins on a page, if it is worth one: uint8 [nbytes]."""
    if nbytes < TOGETHER_BYTES:
        return fresh(nbytes)
    memory = fresh(nbytes + PAGE_BYTES)
    first = -memory.data_ptr() % PAGE_BYTES
    return memory[first : first + nbytes]


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, stop) of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of(cls, info: TensorInfo) -> "Entry":
        """From what a safetensors header says."""
        return cls(info.file, DTYPES[info.dtype], info.shape, info.start, info.stop)

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
    def of(cls, directory: Path, infos: Mapping[str, TensorInfo]) -> "Shards":
        """From the headers of the directory's files."""
        return cls(directory, {name: Entry.of(info) for name, info in infos.items()})

    def read(self, name: str, into: Allocate = fresh) -> Tensor:
        """Read one tensor by its name in the files; see read_entry."""
        return read_entry(name, self.entries[name], into)


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file; see safetensors_header.read_header."""
    return {name: Entry.of(info) for name, info in safetensors_header.read_header(path).items()}


def read_entry(name: str, entry: Entry, into: Allocate = fresh) -> Tensor:
    """Read a tensor, by default into fresh memory.

    Args:
        name: the tensor's, for errors.
        into: returns memory of the given number of bytes, uint8 on the CPU.

    Raises:
        CheckpointError: the file is gone, cannot be read, or ends before the tensor does.
    """
    data = into(entry.nbytes)
    if entry.nbytes:
        nbytes = _read_into(name, entry, data.numpy().data)
        if nbytes != entry.nbytes:
            raise CheckpointError(
                f"the data of {name} ends early",
                where=str(entry.file),
                expected=f"{entry.nbytes} B",
                found=f"{nbytes} B",
                remedy="The file changed while it was read, or is still being written.",
            )
    return data.view(entry.dtype).view(entry.shape)


def _read_into(name: str, entry: Entry, view: memoryview) -> int:
    """Fill `view` from the file; returns the bytes read, fewer only at the file's end."""
    done = 0
    with open_regular(entry.file, what=f"the data of {name} cannot be read") as file:
        while done < entry.nbytes:  # one call reads at most 2 GiB
            nbytes = os.preadv(file.fileno(), [view[done:]], entry.start + done)
            if nbytes == 0:
                break
            done += nbytes
    return done


def check_finite(name: str, file: Path, data: Tensor) -> None:
    """Raise if a dense tensor, or as much of it as was read, holds NaN or infinity.

    Args:
        name, file: of the tensor, for the error.

    Raises:
        CheckpointError: it does.
    """
    if all_finite(data):
        return
    invalid = data.numel() - int(torch.isfinite(data).sum())
    raise CheckpointError(
        f"tensor {name} holds NaN or infinity",
        where=str(file),
        expected="finite values",
        found=f"{invalid} of {data.numel()} are not",
        remedy="The checkpoint is damaged; download it again.",
    )
