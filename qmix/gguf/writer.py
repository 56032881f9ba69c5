"""Writing a GGUF file: its header, then tensor after tensor as their bytes come, none held.

Knows nothing of models. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qmix.files.file_errors import writing
from qmix.gguf.container import MAGIC
from qmix.gguf.header_fields import Value
from qmix.gguf.tensor_types import BY_NAME, TYPES

_VERSION, _ALIGNMENT = 3, 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_ARRAYS: Mapping[str, int] = {
    "B": 0, "b": 1, "H": 2, "h": 3, "I": 4, "i": 5, "f": 6, "Q": 10, "q": 11, "d": 12,
}  # fmt: skip
_NUMBERS = {kind.name: number for number, kind in TYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written: its type by name, its shape with the outermost axis first."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        kind = BY_NAME[self.type]
        return math.prod(self.shape) // kind.block_size * kind.block_bytes


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[PlannedTensor],
    data: Iterable[Iterable[memoryview]],
) -> None:
    """Write a new file and force it to the disk.

    Args:
        metadata: by key; whole numbers are written as uint32, or int32 if negative, others as
            float32.
        tensors: all of them, in order.
        data: of each tensor, in parts.

    Raises:
        WriteError: the file cannot be written.
    """
    with writing(path):
        file = path.open("xb")
    try:
        with writing(path):
            file.write(_padded(_header(metadata, tensors)))
        for tensor, parts in zip(tensors, data, strict=True):
            written = 0
            for part in parts:
                with writing(path):
                    file.write(part)
                written += part.nbytes
            assert written == tensor.nbytes, tensor.name
            with writing(path):
                file.write(bytes(-written % _ALIGNMENT))
        with writing(path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
    finally:
        with suppress(OSError):  # it would try again to write what failed
            file.close()


def _header(metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for tensor in tensors:
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        parts += [_string(tensor.name), sizes]
        parts.append(struct.pack("<IQ", _NUMBERS[tensor.type], offset))
        offset += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return b"".join(parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    """A value after its type."""
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, int):
        return (
            struct.pack("<Ii", _INT32, value) if value < 0 else struct.pack("<II", _UINT32, value)
        )
    if isinstance(value, array):
        head = struct.pack("<IIQ", _ARRAY, _ARRAYS[value.typecode], len(value))
        return head + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
