"""One vector for each calibration token: in memory, on a GPU or, beyond a budget, in a file.

The file is read and written by explicit calls and never mapped, because mapped pages count as
resident memory. Final values are hashed as they are written to it, so that saving them needs no
second reading. An array in memory is hashed as it is saved, which another thread may do while its
values are read. Shape letters: T tokens, D width, n rows of one call. Knows nothing of layers.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.files import atomic_file
from qmix.files.file_errors import writing
from qmix.files.regular_file import reading
from qmix.kernels.gpu.current_device import side_stream

_HOST = torch.device("cpu")
_CHUNK_BYTES = 1 << 24  # of one system call, where rows are consecutive


class Activations:
    """An array [T, D].

    Args:
        tokens, width: T and D.
        path: the file that holds the array; None keeps it in memory. An existing file must have
            exactly the right size; a missing one is created.
        device: whose memory holds the array, if no file does.
        dtype: of the array.
        shared: other processes write rows of the file too, so it is hashed when it is saved.

    Raises:
        CheckpointError: the file has another size.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        path: Path | None = None,
        *,
        device: torch.device = _HOST,
        dtype: torch.dtype = torch.float32,
        shared: bool = False,
    ) -> None:
        self.tokens, self.width, self.path = tokens, width, path
        self._dtype, self._row_bytes = dtype, dtype.itemsize * width
        self._data: Tensor | None = None
        self._shared = shared
        self._digest, self._final_rows = hashlib.sha256(), 0
        if path is None:
            self._data = torch.zeros(tokens, width, device=device, dtype=dtype)
            return
        expected = tokens * self._row_bytes
        if path.exists() and path.stat().st_size != expected:
            raise CheckpointError(
                "wrong size",
                where=str(path),
                expected=f"{expected} B",
                found=f"{path.stat().st_size} B",
                remedy="Remove the interrupted run and start again.",
            )
        with path.open("ab") as file:
            file.truncate(expected)

    @property
    def nbytes(self) -> int:
        return self.tokens * self._row_bytes

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), in fresh memory of the device that holds the array."""
        if self._data is not None:
            return self._data[start:stop].clone()
        out = torch.empty(stop - start, self.width, dtype=self._dtype)
        with self._open(os.O_RDONLY) as descriptor:
            self._read(descriptor, out, start)
        return out

    def rows(self, index: Tensor) -> Tensor:
        """The rows [n, D] at an ascending int64 index [n]."""
        if self._data is not None:
            return self._data[index.to(self._data.device)]
        out = torch.empty(len(index), self.width, dtype=self._dtype)
        breaks = (index[1:] != index[:-1] + 1).nonzero()[:, 0].add_(1).tolist()
        bounds = [0, *breaks, len(index)] if len(index) else []
        with self._open(os.O_RDONLY) as descriptor:
            for first, last in pairwise(bounds):
                self._read(descriptor, out[first:last], int(index[first]))
        return out

    def write(self, start: int, values: Tensor) -> None:
        """Replace the rows from `start` on with `values` [n, D], from any device."""
        if self._data is not None:
            self._data[start : start + len(values)] = values
            return
        with self._open(os.O_RDWR) as descriptor:
            self._write(descriptor, self._bytes(values), start)

    def write_final(self, start: int, values: Tensor) -> None:
        """`write` values that `save` will save: every row once, from the first to the last.

        If the array is shared, every row is written once by one of the processes.
        """
        if self._shared:
            self.write(start, values)
            return
        assert start == self._final_rows, "in order"
        if self._data is None:
            self._digest.update(self._bytes(values).data)
        self._final_rows += len(values)
        self.write(start, values)

    def add_rows(self, index: Tensor, values: Tensor) -> None:
        """Add `values` [n, D], from any device, to the rows at an ascending index [n]."""
        if self._data is not None:
            device = self._data.device
            self._data.index_add_(0, index.to(device), values.to(device, self._dtype))
            return
        total = self._bytes(self.rows(index).add_(values.to(_HOST, self._dtype)))
        total = total.reshape(-1, self._row_bytes)
        with self._open(os.O_RDWR) as descriptor:
            for row, data in zip(index.tolist(), total, strict=True):
                self._write(descriptor, data, row)

    def save(self, path: Path) -> str:
        """Put the array on the disk at `path`, complete or not at all.

        An array in a file moves there: the file is renamed. Every row must be final.

        Returns:
            SHA-256 of the file, in hexadecimal.
        """
        assert self._shared or self._final_rows == self.tokens, "every row is final"
        if self._data is not None:
            with side_stream(self._data.device):
                atomic_file.write_parts(path, self._hashed_parts(self._data))
            return self._digest.hexdigest()
        assert self.path is not None
        with self._open(os.O_RDWR) as descriptor:
            os.fsync(descriptor)
        self.path.rename(path)
        self.path = path
        return self._file_digest() if self._shared else self._digest.hexdigest()

    @classmethod
    def load(
        cls,
        path: Path,
        tokens: int,
        width: int,
        *,
        in_memory: bool,
        device: torch.device = _HOST,
        dtype: torch.dtype = torch.float32,
    ) -> "Activations":
        """Read what `save` wrote, into a device's memory or as it lies in the file.

        Raises:
            CheckpointError: the file is missing or has another size.
        """
        if not path.is_file():
            raise CheckpointError(
                "missing", where=str(path), remedy="Remove the interrupted run and start again."
            )
        stored = cls(tokens, width, path, dtype=dtype)
        if not in_memory:
            return stored
        loaded = cls(tokens, width, device=device, dtype=dtype)
        loaded.write(0, stored.read(0, tokens))
        return loaded

    def _hashed_parts(self, data: Tensor) -> Iterator[memoryview]:
        """The bytes of an array in memory, a few megabytes at a time."""
        self._digest = hashlib.sha256()
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        for start in range(0, self.tokens, step):
            part = self._bytes(data[start : start + step]).data
            self._digest.update(part)
            yield part

    def _file_digest(self) -> str:
        assert self.path is not None
        with reading(self.path), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _bytes(self, values: Tensor) -> NDArray[np.uint8]:
        """Values [n, D] of any device and dtype, as the file holds them."""
        host = values.to(_HOST, self._dtype).contiguous()
        raw: NDArray[np.uint8] = host.view(torch.uint8).numpy().reshape(-1)
        return raw

    def _read(self, descriptor: int, out: Tensor, row: int) -> None:
        view, done = out.view(torch.uint8).numpy().reshape(-1), 0
        offset = row * self._row_bytes
        while done < view.size:
            chunk = view[done : done + _CHUNK_BYTES].data
            count = os.preadv(descriptor, [chunk], offset + done)
            if count == 0:
                raise CheckpointError("ends early", where=str(self.path))
            done += count

    def _write(self, descriptor: int, data: NDArray[np.uint8], row: int) -> None:
        done = 0
        while done < data.size:
            offset = row * self._row_bytes + done
            done += os.pwrite(descriptor, data[done : done + _CHUNK_BYTES].data, offset)

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        """The descriptor of the file; what the system says within the block names the file."""
        assert self.path is not None
        named = reading if flags == os.O_RDONLY else writing
        with named(self.path):
            descriptor = os.open(self.path, flags | os.O_CLOEXEC)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
