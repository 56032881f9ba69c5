"""PromptCache: keys and values of texts in a folder, so that no beginning is computed twice.

A file holds the ids of one text and the cache behind them, as safetensors. Its name says what it
can be used for and what it holds: `MODEL-DIGEST.safetensors`. A file that is not what its name says
is no use, and is removed. The folder has a limit; the files unused for longest go first. Files of
other names are left alone. Knows models by a name that is given.
"""

import hashlib
import os
import re
import secrets
import time
import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from qmix.errors import CheckpointError, WriteError
from qmix.files import user_files
from qmix.files.file_errors import writing
from qmix.files.regular_file import reading
from qmix.formats.files.shard_writer import ShardWriter, file_digest
from qmix.formats.files.shards import read_entries, read_entry
from qmix.formats.tensor_spec import TensorSpec
from qmix.gguf.files import gguf_files
from qmix.nn.cache import KVCache
from qmix.text.common_prefix import common_prefix

LIMIT_BYTES = 16 << 30
LEAST = 32  # positions that are worth a file
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_DESCRIPTIONS = ("*config.json", "params.json", "qmix_manifest.json")
# Of a weight file: they tell a fine-tuned model from its parent, and take milliseconds.
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_ABANDONED_S = 24 * 3600.0  # after which a file that is being written has no writer any more
_TEXT = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}\.safetensors")
_PARTIAL = re.compile(r"[0-9a-f]{16}\.writing")


def checkpoint_name(path: Path) -> str:
    """A name that another checkpoint, or a changed one, does not have: a SHA-256.

    It is made of what describes the checkpoint, and of its weight files' names, sizes, times and a
    sample of their bytes, since archives and container images give many files the same time.

    Raises:
        CheckpointError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with reading(path):
        files = sorted(path.iterdir()) if path.is_dir() else gguf_files(path)
    for file in filter(Path.is_file, files):  # a link that leads nowhere is none
        with reading(file):
            if file.suffix in _WEIGHTS:
                _sample(file, digest)
            elif any(fnmatch(file.name, pattern) for pattern in _DESCRIPTIONS):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _sample(file: Path, digest: "hashlib._Hash") -> None:
    """Hash a weight file's name, size and time, and bytes from its beginning to its end."""
    about = file.stat()
    digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    with file.open("rb") as data:
        for part in range(_SAMPLES):
            data.seek(part * max(about.st_size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
            digest.update(data.read(_SAMPLE_BYTES))


@dataclass(frozen=True)
class Stored:
    """A file, and the ids of its text."""

    path: Path
    ids: "array[int]"


@dataclass(frozen=True, eq=False)
class Found:
    """The beginning of a text, for KVCache.fill: positions, and keys and values of each layer."""

    length: int
    layers: list[tuple[Tensor, Tensor]]


class PromptCache:
    """A folder of texts' caches, for one model.

    Args:
        model: which one, as checkpoint_name says.
        limit_bytes: of all files in the folder, those of other models too.

    Raises:
        WriteError: the folder cannot be made, or others can write to it.
    """

    def __init__(self, folder: Path, model: str, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder, self._model, self._limit = folder.absolute(), model, limit_bytes
        # What was read of each file: a folder may hold thousands, and a request asks for them all.
        self._known: dict[tuple[str, int, int], array[int]] = {}
        user_files.prepare(self._folder / "any")

    def find(self, kind: KVCache, ids: Sequence[int], held: int = 0) -> "Found | None":
        """Read the longest beginning of a text that is stored; None: there is none.

        One id of the text at least is left to be computed.

        Args:
            kind: a cache that such a file has to fit; it may be empty.
            held: positions of the text that the cache has already; a file has to give LEAST more.
        """
        least, wanted = held + LEAST, array("i", ids[:-1])
        if len(wanted) < least:
            return None
        usable = [(_usable(kind, stored.ids, wanted), stored) for stored in self._of_kind(kind)]
        for length, stored in sorted(usable, key=lambda each: each[0], reverse=True):
            if length < least:
                break
            if _is_whole(stored.path):
                with suppress(CheckpointError):
                    user_files.check(stored.path)
                    layers = list(_layers(stored.path, kind))
                    _mark_used(stored.path)
                    return Found(length, layers)
            _remove(stored.path)
        return None

    def restore(self, cache: KVCache, ids: Sequence[int], held: int = 0) -> int:
        """Fill a cache with what `find` finds; its positions.

        0 leaves the cache as it is.
        """
        found = self.find(cache, ids, held)
        if found is None:
            return 0
        cache.fill(found.length, found.layers)
        return found.length

    def store(self, cache: KVCache, ids: Sequence[int]) -> bool:
        """Keep what a cache holds, whose positions have these ids; whether a file was written.

        None is for a text that is too short or too long, or that the folder has. A file of a
        beginning of this text, which this one can stand for, is removed.

        Raises:
            WriteError: the file cannot be written.
        """
        ids = array("i", ids[: cache.length])
        nbytes = sum(part.nbytes for layer in range(len(cache)) for part in cache.view(layer))
        if len(ids) < LEAST or nbytes > self._limit:
            return False
        shorter: list[Path] = []
        for stored in self._of_kind(cache):
            if _usable(cache, stored.ids, ids) == len(ids):
                _mark_used(stored.path)
                return False
            if _usable(cache, ids, stored.ids) == len(stored.ids):
                shorter.append(stored.path)
        self._write(cache, ids)
        for path in shorter:
            _remove(path)
        self._trim()
        return True

    def keep(self, cache: KVCache, ids: Sequence[int]) -> int:
        """Store a text; how many of its positions the folder has then, all or none.

        A folder that cannot be written is warned of: the text only takes longer to read again.
        """
        try:
            self.store(cache, ids)
        except WriteError as error:
            warnings.warn(f"a prompt was not kept: {error}", stacklevel=2)
        text = array("i", ids[: cache.length])
        has = any(_usable(cache, held.ids, text) == len(text) for held in self._of_kind(cache))
        return len(text) if has else 0

    def _kind(self, cache: KVCache) -> str:
        """What the name of a file begins with that such a cache can take."""
        return hashlib.sha256(f"{self._model} {cache}".encode()).hexdigest()[:16]

    def _of_kind(self, cache: KVCache) -> list[Stored]:
        """The files that such a cache can take; damaged ones are left out."""
        kind, known = self._kind(cache), {}
        stored: list[Stored] = []
        for path, found in self._files(_TEXT):
            key = (path.name, found.st_ino, found.st_mtime_ns)
            if path.name.startswith(kind):
                with suppress(CheckpointError, KeyError):
                    known[key] = self._known[key] if key in self._known else _ids(path)
                    stored.append(Stored(path, known[key]))
        self._known = known
        return stored

    def _write(self, cache: KVCache, ids: Sequence[int]) -> None:
        tensors = {"ids": torch.tensor(ids, dtype=torch.int32)}
        for layer in range(len(cache)):
            keys, values = cache.view(layer)
            tensors |= {f"keys.{layer}": keys, f"values.{layer}": values}
        specs = [TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
        partial = self._folder / f"{secrets.token_hex(8)}.writing"
        user_files.prepare(partial)  # somebody may have removed the folder, or opened it to others
        digest = hashlib.sha256()
        try:
            with writing(partial):
                with ShardWriter(partial, specs, digest) as writer:
                    partial.chmod(0o600)
                    for name, tensor in tensors.items():
                        writer.write(name, tensor)
                whole = f"{self._kind(cache)}-{digest.hexdigest()}.safetensors"
                partial.replace(self._folder / whole)
        finally:
            _remove(partial)

    def _trim(self) -> None:
        """Remove what is unused for longest, until the rest fits the limit."""
        for path, found in self._files(_PARTIAL):
            if time.time() - found.st_mtime > _ABANDONED_S:
                _remove(path)
        files = self._files(_TEXT)
        total = sum(found.st_size for _, found in files)
        for path, found in sorted(files, key=lambda file: file[1].st_mtime_ns):
            if total <= self._limit:
                return
            _remove(path)
            total -= found.st_size

    def _files(self, name: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
        """Those of a name that are there: other processes write and trim too."""
        files = []
        with suppress(OSError):  # the folder was removed, or its disk fails
            for path in sorted(self._folder.iterdir()):
                if name.fullmatch(path.name):
                    with suppress(OSError):
                        files.append((path, path.stat()))
        return files


def _remove(path: Path) -> None:
    """Remove a file, unless the folder can only be read."""
    with suppress(OSError):
        path.unlink()


def _mark_used(path: Path) -> None:
    """Let a file count as used now, unless the folder can only be read."""
    with suppress(OSError):
        os.utime(path)


def _usable(cache: KVCache, held: "array[int]", ids: "array[int]") -> int:
    """How many positions of a text a cache that holds another one can give."""
    common = common_prefix(held, ids)
    is_full_ring = cache.window is not None and len(held) >= cache.window
    return common if common == len(held) or not is_full_ring else 0


def _is_whole(path: Path) -> bool:
    """Whether a file holds what its name says."""
    try:
        return file_digest(path) == path.stem.partition("-")[2]
    except CheckpointError:
        return False


def _ids(path: Path) -> "array[int]":
    """The ids of a file's text.

    Raises:
        CheckpointError: the file is damaged, or may be another user's.
        KeyError: it has none.
    """
    user_files.check(path)
    ids = read_entry("ids", read_entries(path)["ids"])
    return array("i", ids.to(torch.int32).flatten().tolist())


def _layers(path: Path, cache: KVCache) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, as KVCache.fill takes them."""
    entries = read_entries(path)
    for layer in range(len(cache)):
        names = (f"keys.{layer}", f"values.{layer}")
        keys, values = (read_entry(name, entries[name]) for name in names)
        yield keys, values
