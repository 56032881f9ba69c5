"""Writing safetensors files tensor by tensor, one file or many shards, without holding any.

The same tensors give the same bytes on every machine. Knows nothing of models.
Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from qmix.files.file_errors import writing
from qmix.files.regular_file import open_regular
from qmix.formats.files.safetensors_header import HEADER_BYTES
from qmix.formats.files.shard_index import write_index
from qmix.formats.files.shard_names import shard_name
from qmix.formats.files.shards import DTYPES
from qmix.formats.tensor_spec import TensorSpec

_ALIGNMENT = 8  # bytes
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_OFFSET = 1 << 48  # as long in decimal as any real one, or longer

_CHUNK_BYTES = 16 << 20

# dtype, shape, and where the data start and stop.
_HeaderEntry = tuple[str, tuple[int, ...], int, int]


class ShardWriter:
    """One safetensors file, written tensor by tensor without holding any.

    Space for the header is reserved from the specs and filled in by `close`; the data follow in the
    order of writing. Tensors whose size would misalign the next one are few and small (quantization
    states): they are kept and written last.

    Args:
        specs: of every tensor that will be written.
        digest: takes all bytes as they are written, in the order of `file_digest`.
        maker: what the header says of the file's format: "pt", or "mlx".
    """

    def __init__(
        self,
        path: Path,
        specs: Sequence[TensorSpec],
        digest: "hashlib._Hash | None" = None,
        maker: str = "pt",
    ) -> None:
        self.path = path
        self._maker = maker
        self._digest = digest
        self._specs = {spec.name: spec for spec in specs}
        self._written: dict[str, _HeaderEntry] = {}
        self._deferred: dict[str, Tensor] = {}
        self._end = 0  # of the data so far
        longest = {
            spec.name: (_DTYPE_NAMES[spec.dtype], spec.shape, _LARGEST_OFFSET, _LARGEST_OFFSET)
            for spec in specs
        }
        self._header_bytes = -(-(8 + len(_header(longest, maker))) // _ALIGNMENT) * _ALIGNMENT - 8
        with writing(path):
            self._file = path.open("xb")
            self._file.seek(8 + self._header_bytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append a tensor that a spec describes.

        Raises:
            WriteError: the file cannot be written.
        """
        spec = self._specs[name]
        assert tensor.dtype == spec.dtype, name
        assert tensor.nbytes <= spec.nbytes, name
        if tensor.nbytes % _ALIGNMENT:
            self._deferred[name] = tensor
        else:
            self._append(name, tensor)

    def close(self) -> None:
        """Write the deferred tensors and the header, and force everything to the disk.

        Raises:
            WriteError: the file cannot be written.
        """
        for name, tensor in sorted(
            self._deferred.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])
        ):
            self._append(name, tensor)
        assert self._written.keys() == self._specs.keys(), "every tensor of the specs is written"
        header = _header(self._written, self._maker).ljust(self._header_bytes)
        with writing(self.path):
            self._file.seek(0)  # flushes
        self._write(self._header_bytes.to_bytes(8, "little") + header)
        with writing(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def _append(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        if data.nbytes:
            self._write(data.view(-1).view(torch.uint8).numpy().data)
        start, self._end = self._end, self._end + data.nbytes
        self._written[name] = (_DTYPE_NAMES[data.dtype], tuple(data.shape), start, self._end)

    def _write(self, data: bytes | memoryview) -> None:
        with writing(self.path):
            self._file.write(data)
        if self._digest is not None:
            self._digest.update(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            with suppress(OSError):  # it would try again to write what failed
                self._file.close()


def file_digest(path: Path) -> str:
    """SHA-256 of a safetensors file, in hexadecimal: its data first, and its header last.

    A header is known only when the data are written, so this is the order in which they are hashed.
    A damaged file has a digest too, another one.

    Raises:
        CheckpointError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        length = file.read(8)
        header = length + file.read(min(int.from_bytes(length, "little"), HEADER_BYTES))
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    digest.update(header)
    return digest.hexdigest()


def write_shards(
    folder: Path,
    groups: Sequence[Sequence[TensorSpec]],
    tensors: Iterable[Mapping[str, Tensor]],
    max_bytes: int,
    *,
    maker: str = "pt",
) -> None:
    """Write shards with the hub's names and their index, holding one group of tensors at a time.

    Args:
        groups: what will be written; a group (one weight's codes and scales) stays in one shard.
        tensors: the tensors of each group by name, in the same order.
        max_bytes: of a shard; a larger group gets a shard of its own.
        maker: see ShardWriter.
    """
    shards = _split(groups, max_bytes)
    remaining = iter(tensors)
    weight_map: dict[str, str] = {}
    total = 0
    for index, shard in enumerate(shards):
        name = shard_name(index, len(shards))
        planned = [spec for group in shard for spec in group]
        with ShardWriter(folder / name, planned, maker=maker) as writer:
            for group in shard:
                values = next(remaining)
                for spec in group:
                    writer.write(spec.name, values[spec.name])
                    weight_map[spec.name] = name
                    total += values[spec.name].nbytes
                del values  # or it would be held while the next group is made
    write_index(folder, weight_map, total)


def _split(
    groups: Sequence[Sequence[TensorSpec]], max_bytes: int
) -> list[list[Sequence[TensorSpec]]]:
    """Distribute groups over shards of at most `max_bytes`, in order."""
    shards: list[list[Sequence[TensorSpec]]] = [[]]
    shard_bytes = 0
    for group in groups:
        group_bytes = sum(spec.nbytes for spec in group)
        if shards[-1] and shard_bytes + group_bytes > max_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(group)
        shard_bytes += group_bytes
    return shards


def _header(entries: Mapping[str, _HeaderEntry], maker: str) -> bytes:
    document: dict[str, Any] = {"__metadata__": {"format": maker}}
    for name, (dtype, shape, start, stop) in entries.items():
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    return json.dumps(document, separators=(",", ":")).encode()
