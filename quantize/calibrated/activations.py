"""One vector a calibration token, in memory or, beyond a budget, in a file.

Read and written by explicit calls, never mapped: a mapped file counts as resident memory. Shape
letters: T tokens, D width. Knows nothing of layers.
"""

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.errors import CheckpointError

_RUN = 1 << 24  # bytes read or written at a time where rows follow each other


class Activations:
    """float32 [T, D].

    Args:
        path: the file that holds them; None keeps them in memory. An existing file must have
            exactly this size; a new one is made.
    """

    def __init__(self, tokens: int, width: int, path: Path | None = None) -> None:
        self.tokens, self.width, self.path = tokens, width, path
        self._row = 4 * width
        self._data: Tensor | None = None
        if path is None:
            self._data = torch.zeros(tokens, width)
            return
        expected = tokens * self._row
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
        return self.tokens * self._row

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in fresh memory."""
        if self._data is not None:
            return self._data[start:stop].clone()
        out = torch.empty(stop - start, self.width)
        with self._open("rb") as descriptor:
            self._read(descriptor, out, start)
        return out

    def rows(self, index: Tensor) -> Tensor:
        """The rows of an ascending int64 index [n], as [n, D]."""
        if self._data is not None:
            return self._data[index]
        out = torch.empty(len(index), self.width)
        breaks = (index[1:] != index[:-1] + 1).nonzero()[:, 0].add_(1).tolist()
        bounds = [0, *breaks, len(index)] if len(index) else []
        with self._open("rb") as descriptor:
            for first, last in pairwise(bounds):
                self._read(descriptor, out[first:last], int(index[first]))
        return out

    def write(self, start: int, values: Tensor) -> None:
        """Replace the rows from `start` on by `values` [n, D], from any device."""
        values = values.to("cpu", torch.float32).contiguous()
        if self._data is not None:
            self._data[start : start + len(values)] = values
            return
        with self._open("r+b") as descriptor:
            self._write(descriptor, values.numpy().view("u1").reshape(-1), start)

    def add_rows(self, index: Tensor, values: Tensor) -> None:
        """Add `values` [n, D], from any device, to the rows of an ascending index [n]."""
        values = values.to("cpu", torch.float32)
        if self._data is not None:
            self._data.index_add_(0, index, values)
            return
        total = self.rows(index).add_(values).numpy().view("u1").reshape(-1, self._row)
        with self._open("r+b") as descriptor:
            for row, data in zip(index.tolist(), total, strict=True):
                self._write(descriptor, data, row)

    def save(self, path: Path) -> None:
        """Put them on the disk under `path`, complete or not at all; a file moves there."""
        if self._data is not None:
            partial = path.with_name(path.name + ".writing")
            with partial.open("wb") as file:
                file.write(self._data.numpy().data)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            return
        assert self.path is not None
        with self._open("rb") as descriptor:
            os.fsync(descriptor)
        self.path.rename(path)
        self.path = path

    @classmethod
    def load(cls, path: Path, tokens: int, width: int, *, in_memory: bool) -> "Activations":
        """What `save` wrote.

        Raises:
            CheckpointError: not a file of this size.
        """
        if not path.is_file():
            raise CheckpointError(
                "missing", where=str(path), remedy="Remove the interrupted run and start again."
            )
        stored = cls(tokens, width, path)
        if not in_memory:
            return stored
        held = cls(tokens, width)
        held.write(0, stored.read(0, tokens))
        return held

    def _read(self, descriptor: int, out: Tensor, row: int) -> None:
        view, done, offset = out.numpy().view("u1").reshape(-1), 0, row * self._row
        while done < view.size:
            got = os.preadv(descriptor, [view[done : done + _RUN].data], offset + done)
            if got == 0:
                raise CheckpointError("ends early", where=str(self.path))
            done += got

    def _write(self, descriptor: int, data: NDArray[np.uint8], row: int) -> None:
        done = 0
        while done < data.size:
            place = row * self._row + done
            done += os.pwrite(descriptor, data[done : done + _RUN].data, place)

    def _open(self, mode: str) -> "_Descriptor":
        assert self.path is not None
        return _Descriptor(self.path, os.O_RDWR if "+" in mode else os.O_RDONLY)


class _Descriptor:
    def __init__(self, path: Path, flags: int) -> None:
        self._descriptor = os.open(path, flags | os.O_CLOEXEC)

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
