"""Safetensors files: a strict reader of one file or of shards with an index, a streaming writer.

Reads by pread into fresh memory, so a truncated file is an error and never a signal, and resident
memory is what was asked for. Knows nothing of models: only names, dtypes, shapes and bytes.
Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, data).
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError, UnsupportedError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Mixtral-8x7B has about 5,500 tensors as NF4: under 1 MB of header in one file.
HEADER_BYTES = 8 << 20
_ALIGNMENT = 8

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

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


@dataclass(frozen=True)
class Shards:
    """All tensors of a directory, by their names in the files."""

    directory: Path
    entries: Mapping[str, Entry]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def read(self, name: str) -> Tensor:
        """One tensor in fresh memory.

        Raises:
            CheckpointError: the file changed since it was opened.
        """
        entry = self.entries[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            read = _read_into(entry, data.numpy().data)
            if read != entry.nbytes:
                raise CheckpointError(
                    f"the data of {name} ends early",
                    where=str(entry.file),
                    expected=f"{entry.nbytes} B",
                    found=f"{read} B",
                    remedy="The file changed while it was read, or is still being written.",
                )
        return data.view(entry.dtype).view(entry.shape)


def open_shards(directory: str | Path) -> Shards:
    """Open a checkpoint directory and check every header against its file.

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
    entries: dict[str, Entry] = {}
    for name, expected in mapped.items():
        path = inside(folder, name)
        found = read_header(path)
        if expected is not None and found.keys() != expected:
            raise _different(path, expected, found.keys())
        entries.update(found)
    return Shards(folder, entries)


def read_header(path: Path) -> dict[str, Entry]:
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


def _entry(path: Path, name: str, spec: Any, base: int) -> Entry:
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
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise refuse(f"the data is not {shape} of {spec['dtype']}", offsets)
    return Entry(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


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
    (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


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


def shard_name(index: int, count: int) -> str:
    """The hub's file name of shard `index`, counted from 0, of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"
