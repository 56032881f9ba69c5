"""Safetensors headers: the tensors of one file, or of shards with an index, without their data.

Every claim of a header is checked against its file. Knows no torch and nothing of models: names,
dtypes by their names, shapes and offsets.
Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data).
"""

import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats.files.shard_names import INDEX, SINGLE

# Mixtral-8x7B has about 5,500 tensors as NF4: under 1 MB of header in one file.
HEADER_BYTES = 8 << 20

# The format's dtypes: torch's names for them and bytes an element.
DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

_BLANKS = b" \t\r\n\xef\xbb\xbf"
KNOWN_STARTS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file", "Run git lfs pull."),
    (b"PK\x03\x04", "a zip archive (a PyTorch pickle?)", "qmix reads safetensors only."),
    (b"\x80\x02", "a Python pickle", "qmix reads safetensors only."),
    (b"\x80\x03", "a Python pickle", "qmix reads safetensors only."),
    (b"\x80\x04", "a Python pickle", "qmix reads safetensors only."),
    (b"\x80\x05", "a Python pickle", "qmix reads safetensors only."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"<", "a web page", "Download the file itself."),
    (b"GGUF", "a GGUF file", "qmix reads safetensors only."),
)


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor: a dtype of `DTYPES`, and bytes [start, stop) of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_headers(directory: str | Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint directory, by their names in the files.

    Raises:
        CheckpointError: nothing to read, a damaged or foreign file, an index that leaves the
            directory or does not name exactly the tensors that the files hold.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError("no such directory", where=str(folder))
    present = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
    if (folder / INDEX).is_file():
        mapped = _read_index(folder)
        # Mistral's own files may lie beside the converted ones; they repeat the same weights.
        stray = [n for n in present if n not in mapped and not n.startswith("consolidated")]
        if stray:
            raise CheckpointError(
                "the index does not list every shard",
                where=str(folder / INDEX),
                found=", ".join(stray[:5]),
                remedy="Remove the extra files or mend the index.",
            )
    elif SINGLE in present or len(present) == 1:
        mapped = {SINGLE if SINGLE in present else present[0]: None}
    else:
        raise _nothing_to_read(folder, present)
    headers: dict[str, TensorInfo] = {}
    for name, expected in mapped.items():
        path = inside(folder, name)
        found = read_header(path)
        if expected is not None and found.keys() != expected:
            raise _different(path, expected, found.keys())
        headers.update(found)
    return headers


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, every claim of the header checked against the file."""

    start = b""

    def refuse(what: str, expected: object = None, found: object = None) -> CheckpointError:
        for magic, kind, remedy in KNOWN_STARTS:
            if start.lstrip(_BLANKS).startswith(magic):
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
    if not raw.startswith(b"{"):
        raise refuse("the header is not a JSON object", found=ascii(raw[:16]))
    start = b""  # a header's length may look like another format's first bytes
    header = strict_json.loads(raw, where=f"{path} header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise refuse("__metadata__ is not a table of strings")
    entries = {name: _entry(path, name, spec, 8 + length) for name, spec in header.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise refuse(f"a gap or overlap before {name}", f"offset {end}", entry.start)
        end = entry.stop
    if end != size:
        missing = end - size
        raise refuse(
            f"the file is {missing} B short" if missing > 0 else f"{-missing} B too many",
            f"{end} B",
            f"{size} B",
        )
    return entries


def _entry(path: Path, name: str, spec: Any, base: int) -> TensorInfo:
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
    return TensorInfo(path, spec["dtype"], tuple(shape), base + offsets[0], base + offsets[1])


def _read_index(folder: Path) -> dict[str, set[str] | None]:
    """Shard file name -> the tensors that the index says it holds."""
    path = folder / INDEX
    document = strict_json.read(path, limit_bytes=strict_json.INDEX_BYTES)
    weight_map = document.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("no weight_map", where=str(path), expected="tensor name -> file name")
    mapped: dict[str, set[str] | None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _plain(name):
            raise CheckpointError(
                f"tensor {tensor}: not a plain file name",
                where=str(path),
                expected="NAME.safetensors in the same directory",
                found=repr(name)[:80],
            )
        names = mapped.setdefault(name, set())
        assert names is not None
        names.add(tensor)
    return mapped


def _plain(name: str) -> bool:
    """A single path component under POSIX and Windows rules alike, ending in .safetensors."""
    return (
        name.endswith(".safetensors")
        and len(name) <= 255
        and "\0" not in name
        and PureWindowsPath(name).name == name
        and "/" not in name
        and not name.startswith("..")
    )


def inside(folder: Path, name: str) -> Path:
    """The path of a file of `folder`, refusing links that leave it (except a hub cache's blobs)."""
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "a shard is missing or its link leads nowhere", where=str(path), found=str(error)
        ) from None
    blobs = home.parent.parent / "blobs"
    if real.parent != home and not (home.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(
            "the shard is a link that leaves the directory", where=str(path), found=str(real)
        )
    return path


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file; a pipe or device is refused without blocking on it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError("cannot be read", where=str(path), found=error.strerror) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("not a regular file", where=str(path))
    return os.fdopen(descriptor, "rb")


def _nothing_to_read(folder: Path, present: Sequence[str]) -> QmixError:
    if present:
        return CheckpointError(
            "several safetensors files and no index",
            where=str(folder),
            expected=f"{SINGLE}, or shards with {INDEX}",
            found=", ".join(present[:5]),
        )
    others = sorted(
        p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf")
    )
    if others:
        return UnsupportedError(
            "no safetensors files",
            where=str(folder),
            found=", ".join(others[:5]),
            remedy="qmix never unpickles: save the model again with safe_serialization=True.",
        )
    return CheckpointError(
        "no safetensors files", where=str(folder), expected=f"{SINGLE} or {INDEX}"
    )


def _different(path: Path, expected: Iterable[str], found: Iterable[str]) -> CheckpointError:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    named = [f"missing {n}" for n in missing[:5]] + [f"unlisted {n}" for n in extra[:5]]
    return CheckpointError(
        "the shard does not hold the tensors that the index lists",
        where=str(path),
        found="; ".join(named[:5]),
    )
