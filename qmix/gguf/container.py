"""The container: a GGUF file's metadata, and where each of its tensors lies.

Every claim of the header is checked against the file. Knows nothing of models.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import UnsupportedError
from qmix.files.regular_file import open_regular
from qmix.gguf.header_fields import HeaderFields, Value
from qmix.gguf.tensor_types import TYPES
from qmix.printable import escaped

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # they differ only in that version 3 knows big-endian files
_ALIGNMENT_KEY = "general.alignment"
_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_DIMENSIONS = 4  # of ggml
_KEY_BYTES, _TENSOR_BYTES = 13, 24  # the least that a key with its value, and a tensor, take
_TENSOR_NAME_BYTES = 1 << 10

_INCOMPLETE = "The download is incomplete, or the file is damaged."


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its type by name, and bytes [start, stop) of the file.

    Attributes:
        shape: outermost axis first, as everywhere else in qmix; the file has it the other way.
    """

    type: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class GGUFFile:
    """What the header of one file says; every tensor lies in the file.

    Attributes:
        metadata: by key: a number, a flag or a string, an `array.array` of numbers (of flags: bytes
            of 0 or 1), or a tuple of strings.
    """

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    alignment: int


def read_gguf(path: str | Path) -> GGUFFile:
    """Read the header of one GGUF file, version 2 or 3, little-endian.

    Raises:
        CheckpointError: another format; or a header that is damaged, too large, or says what the
            file does not hold; or tensors that overlap, leave gaps or do not fill the file.
        UnsupportedError: version 1, or a big-endian file.
    """
    file_path = Path(path)
    with open_regular(file_path) as file:
        file_bytes = os.fstat(file.fileno()).st_size
        fields = HeaderFields(file, file_path, file_bytes)
        _check_start(fields)
        tensor_count = fields.count("the number of tensors", _TENSOR_BYTES)
        key_count = fields.count("the number of keys", _KEY_BYTES)
        metadata = _metadata(fields, key_count)
        claims = _claims(fields, tensor_count)
        alignment = _alignment(fields, metadata)
        data_start = _aligned(fields.position(), alignment)
    tensors = {
        name: GGUFTensor(kind, shape, data_start + offset, data_start + offset + nbytes)
        for name, (kind, shape, offset, nbytes) in claims.items()
    }
    _check_cover(fields, tensors, data_start, alignment)
    return GGUFFile(file_path, metadata, tensors, alignment)


def _check_start(fields: HeaderFields) -> None:
    magic = fields.file.read(4)
    if magic != MAGIC:
        raise fields.wrong("not a GGUF file", ascii(MAGIC), ascii(magic))
    version = fields.number("I", "the version")
    if version in _VERSIONS:
        return
    big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
    if big_endian or version == 1:
        raise UnsupportedError(
            "a big-endian GGUF file" if big_endian else "a GGUF file of version 1",
            where=str(fields.path),
            expected="a little-endian file of version 2 or 3",
            remedy="Download a current file of the model.",
        )
    raise fields.wrong("unknown GGUF version", "2 or 3", version)


def _metadata(fields: HeaderFields, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(count):
        key = fields.key()
        if key in metadata:
            raise fields.wrong("a key stands twice", found=key)
        metadata[key] = fields.value(key)
    return metadata


# Of one tensor: its type, its shape, its offset in the data and its bytes.
_Claim = tuple[str, tuple[int, ...], int, int]


def _claims(fields: HeaderFields, count: int) -> dict[str, _Claim]:
    """What the header says of each tensor, by name; offsets are not checked."""
    claims: dict[str, _Claim] = {}
    for _ in range(count):
        name = fields.string("a tensor's name", _TENSOR_NAME_BYTES)
        if name in claims:
            raise fields.wrong("a tensor stands twice", found=name)
        claims[name] = _claim(fields, f"tensor {escaped(name)}")
    return claims


def _claim(fields: HeaderFields, what: str) -> _Claim:
    dimensions = fields.number("I", f"{what}: the number of its dimensions")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise fields.wrong(f"{what}: wrong number of dimensions", "1 to 4", dimensions)
    sizes = tuple(fields.number("Q", f"{what}: its shape") for _ in range(dimensions))
    number = fields.number("I", f"{what}: its type")
    offset = fields.number("Q", f"{what}: its offset")
    kind = TYPES.get(number)
    if kind is None:
        raise fields.wrong(f"{what}: unknown type", f"a type of ggml, 0 to {max(TYPES)}", number)
    if not all(sizes):
        raise fields.wrong(f"{what}: empty", "sizes from 1 on", list(sizes))
    if sizes[0] % kind.block_size:
        expected = f"a row of whole blocks of {kind.block_size} weights"
        raise fields.wrong(f"{what}: wrong shape for {kind.name}", expected, list(sizes))
    nbytes = math.prod(sizes) // kind.block_size * kind.block_bytes
    if nbytes > fields.file_bytes:
        expected = f"at most {fields.file_bytes} B"
        raise fields.wrong(f"{what}: larger than the file", expected, f"{nbytes} B", _INCOMPLETE)
    return kind.name, sizes[::-1], offset, nbytes


def _alignment(fields: HeaderFields, metadata: Mapping[str, Value]) -> int:
    alignment = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
    if (
        type(alignment) is not int
        or not 8 <= alignment <= _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        expected = f"a power of two from 8 to {_MAX_ALIGNMENT}"
        raise fields.wrong(f"wrong {_ALIGNMENT_KEY}", expected, repr(alignment))
    return alignment


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _check_cover(
    fields: HeaderFields, tensors: Mapping[str, GGUFTensor], data_start: int, alignment: int
) -> None:
    """Raise unless the tensors follow each other, padded to the alignment, up to the file's end."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != _aligned(end, alignment):
            raise fields.wrong(
                f"a gap or overlap before {escaped(name)}, or a wrong alignment",
                f"offset {_aligned(end, alignment)}",
                tensor.start,
            )
        end = tensor.stop
    if not tensors:  # such as the first of split files, which may hold nothing but metadata
        end = min(end, fields.file_bytes)
    found = f"{fields.file_bytes} B"
    if end > fields.file_bytes:
        what = f"the file is {end - fields.file_bytes} B short"
        raise fields.wrong(what, f"{end} B", found, _INCOMPLETE)
    if fields.file_bytes > _aligned(end, alignment):
        what = f"{fields.file_bytes - end} B too many"
        raise fields.wrong(what, f"{end} B and padding", found)
