"""The header of a safetensors file: its tensors without their data.

Every claim of a header is checked against the file. Knows no torch and nothing of models.
Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data).
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.files.regular_file import open_regular

# Mixtral-8x7B has about 5,500 tensors as NF4: under 1 MB of header in one file.
HEADER_BYTES = 8 << 20

# The format's dtypes: torch's name of each, and the bytes of an element.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

_LEADING_BLANKS = b" \t\r\n\xef\xbb\xbf"
# First bytes of other formats: what the file is, and the remedy.
KNOWN_STARTS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file", "Run git lfs pull."),
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle?)", "qmix reads safetensors only."),
    (b"\x80\x02", "a Python pickle", "qmix reads safetensors only."),
    (b"\x80\x03", "a Python pickle", "qmix reads safetensors only."),
    (b"\x80\x04", "a Python pickle", "qmix reads safetensors only."),
    (b"\x80\x05", "a Python pickle", "qmix reads safetensors only."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"<", "a web page", "Download the file itself."),
    (b"GGUF", "a GGUF file", "Name it NAME.gguf and give that file to qmix."),
)


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: a dtype of `DTYPES`, and bytes [start, stop) of `file`.

    Attributes:
        heads: how many, if the rows are interleaved for rotary embeddings, as GGUF stores q and k;
            else 0.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    heads: int = 0

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name.

    Raises:
        CheckpointError: another format; a header that is damaged or too large, names a tensor
            twice or an unknown dtype; or tensors that overlap, leave a gap or do not fill the file.
    """
    header, data_start, file_bytes = _read_json(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ is not a table of strings", where=str(path))
    infos = {name: _tensor_info(path, name, spec, data_start) for name, spec in header.items()}
    _check_cover(path, infos, data_start, file_bytes)
    return infos


def _read_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the header, the offset at which data start, bytes of the file)."""

    def refuse(what: str, expected: object = None, found: object = None) -> CheckpointError:
        for magic, kind, remedy in KNOWN_STARTS:
            if start.lstrip(_LEADING_BLANKS).startswith(magic):
                return CheckpointError(
                    "not a safetensors file", where=str(path), found=kind, remedy=remedy
                )
        return CheckpointError(what, where=str(path), expected=expected, found=found)

    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > size - 8:
            raise refuse("the file ends inside its header", f"{length + 8} B", f"{size} B")
        if length > HEADER_BYTES:
            raise refuse("the header is too large", f"at most {HEADER_BYTES} B", f"{length} B")
        file.seek(8)
        raw = file.read(length)
    # Only here: a header's length may look like the first bytes of another format.
    if not raw.startswith(b"{"):
        raise refuse("the header is not a JSON object", found=ascii(raw[:16]))
    return strict_json.loads(raw, where=f"{path} header"), 8 + length, size


def _tensor_info(path: Path, name: str, spec: Any, data_start: int) -> TensorInfo:
    def refuse(what: str, found: object) -> CheckpointError:
        return CheckpointError(f"tensor {name}: {what}", where=str(path), found=repr(found)[:80])

    if not isinstance(spec, dict) or spec.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("the header entry needs exactly dtype, shape, data_offsets", spec)
    dtype = DTYPES.get(spec["dtype"]) if isinstance(spec["dtype"], str) else None
    if dtype is None:
        raise refuse("unknown dtype", spec["dtype"])
    shape, offsets = spec["shape"], spec["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 1 << 62 for n in numbers
        ):
            raise refuse("shape and offsets must be lists of sizes", numbers)
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype[1]:
        raise refuse(f"the data is not {shape} of {spec['dtype']}", offsets)
    start, stop = (data_start + offset for offset in offsets)
    return TensorInfo(path, spec["dtype"], tuple(shape), start, stop)


def _check_cover(
    path: Path, infos: Mapping[str, TensorInfo], data_start: int, file_bytes: int
) -> None:
    """Raise unless the tensors follow each other without gap or overlap, up to the file's end."""
    end = data_start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != end:
            raise CheckpointError(
                f"a gap or overlap before {name}",
                where=str(path),
                expected=f"offset {end}",
                found=info.start,
            )
        end = info.stop
    if end != file_bytes:
        missing = end - file_bytes
        raise CheckpointError(
            f"the file is {missing} B short" if missing > 0 else f"{-missing} B too many",
            where=str(path),
            expected=f"{end} B",
            found=f"{file_bytes} B",
        )
