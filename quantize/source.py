"""The checkpoint that is being quantized, and the SHA-256 of everything that was read of it.

A tensor is hashed whenever it is read, and a second reading must give the same bytes. At the end of
a run no file of the source may have changed. A thread hashes a tensor while others work on it, so
nobody may write to it. Knows nothing of what the tensors are read for.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qmix.errors import CheckpointError, QmixError
from qmix.files import regular_file
from qmix.files.file_names import visible
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files import companions
from qmix.formats.files.shards import Allocate, Entry, check_finite, fresh, read_entry
from qmix.gguf.files import checked_source, gguf_files, is_gguf

_CHUNK_BYTES = 16 << 20
_THREADS = 4  # that hash at once: one takes 0.6 to 2 GB/s, a disk may give more
# File systems keep times in steps of up to two seconds: a file that was written this shortly before
# it was opened may change without a new time.
_RECENT_NS = 2_000_000_000

# Device, inode, size, and the times of the last change of the data and of the inode.
_Stamp = tuple[int, ...]


@dataclass(frozen=True)
class Source(Checkpoint):
    """A checkpoint that remembers what was read of it.

    Attributes:
        documents: SHA-256 of config.json and of the companions, by file name.
        digests: SHA-256 of each tensor that has been read, by its name in the files. Dtype and
            shape are hashed before the data.
        stamps: of the files when they were opened.
        recent: the files whose next change the stamps might not show.
    """

    documents: Mapping[str, str]
    stamps: Mapping[Path, _Stamp]
    recent: frozenset[Path]
    digests: dict[str, str] = field(default_factory=dict)
    _hashing: list[Future[None]] = field(default_factory=list)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def read_stored(self, name: str, into: Allocate = fresh) -> Tensor:
        """One tensor by its canonical name, as the file has it. The one before it is let go of.

        Raises:
            CheckpointError: it cannot be read; or the one before changed since its first reading.
        """
        self.wait()
        stored_name = self.stored_names[name]
        data = self.shards.read(stored_name, into)
        self._hashing.append(self._thread.submit(self._hash, stored_name, data))
        return data

    def wait(self) -> None:
        """Wait until all that was read is in `digests`.

        Raises:
            CheckpointError: a tensor is not what it was when it was first read.
        """
        while self._hashing:
            self._hashing.pop().result()

    def unread_bytes(self) -> int:
        """Bytes of the tensors that `hash_unread` will read."""
        self.wait()
        entries = self.shards.entries
        return sum(entries[name].nbytes for name in entries.keys() - self.digests.keys())

    def hash_unread(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read every tensor that has not been read yet, so that `digests` has all of them.

        Args:
            progress: called with (bytes done, bytes in all).

        Raises:
            CheckpointError: one cannot be read, or holds NaN or infinity.
        """
        total, entries = self.unread_bytes(), self.shards.entries
        unread = sorted(
            entries.keys() - self.digests.keys(), key=lambda n: (entries[n].file, entries[n].start)
        )
        done = 0
        for name, digest in self._digests_of(unread):
            self._compare(name, digest)
            done += entries[name].nbytes
            progress(done, total)

    def locate(self, name: str) -> str:
        """Where a document, or a tensor by its name in the files, lies."""
        entry = self.shards.entries.get(name)
        return name if entry is None else f"{entry.file.name}: {name}"

    def check_unchanged(self) -> None:
        """Raise if a file has changed since it was opened.

        Whatever was read is read again from files whose times have changed.

        Raises:
            CheckpointError: a header, a document or a tensor is another one now.
        """
        self.wait()
        directory = self.shards.directory
        try:
            again = open_checkpoint(directory)
            documents, present = _documents(directory), set(_files(directory))
        except QmixError as error:
            raise _changed(directory, str(error)) from error
        for name in sorted(self.documents.keys() | documents.keys()):
            if self.documents.get(name) != documents.get(name):
                raise _changed(directory / name, "other content")
        if other := sorted(self.stamps.keys() ^ present):
            raise _changed(other[0], "a file that came or went")
        before, after = self.shards.entries, again.shards.entries
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                raise _changed(directory, f"another header of tensor {name}")
        files = {before[name].file for name in self.digests}
        doubtful = {file for file in files if file in self.recent or self._touched(file)}
        names = [name for name in self.digests if before[name].file in doubtful]
        for name, digest in self._digests_of(names):
            self._compare(name, digest)

    def _digests_of(self, names: list[str]) -> Iterator[tuple[str, str]]:
        """(name, SHA-256) of tensors by their names in the files, read anew."""

        def digest(name: str) -> tuple[str, str]:
            return name, _digest(name, self.shards.entries[name])

        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            yield from pool.map(digest, names)

    def _hash(self, name: str, data: Tensor) -> None:
        digest = _hash_of(self.shards.entries[name])
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.nbytes else b"")
        self._compare(name, digest.hexdigest())

    def _compare(self, name: str, digest: str) -> None:
        """Keep the digest of the first reading of a file that is as it was opened, or compare."""
        file = self.shards.entries[name].file
        if name not in self.digests and self._touched(file):
            raise _changed(file, f"written to before tensor {name} was read")
        first = self.digests.setdefault(name, digest)
        if digest != first:
            raise _changed(
                file,
                f"tensor {name} with SHA-256 {digest[:16]}",
                f"SHA-256 {first[:16]}, as it was read first",
            )

    def _touched(self, file: Path) -> bool:
        return _stamp(file) != self.stamps.get(file, ())


def open_source(directory: Path) -> Source:
    """Open a checkpoint that will be quantized: a directory, or a GGUF file.

    Raises:
        QmixError: see `open_checkpoint`; a companion is too large.
    """
    directory = checked_source(directory)
    stamps = {path: _stamp(path) for path in _files(directory)}
    settled = time.time_ns() - _RECENT_NS
    recent = frozenset(path for path, stamp in stamps.items() if max(stamp[-2:]) > settled)
    documents = _documents(directory)
    checkpoint = open_checkpoint(directory)
    return Source(checkpoint.metadata, checkpoint.shards, documents, stamps, recent)


def _files(directory: Path) -> Sequence[Path]:
    """The files with weights, whether or not they are the model's."""
    return gguf_files(directory) if is_gguf(directory) else visible(directory, "*.safetensors")


def _documents(directory: Path) -> dict[str, str]:
    """SHA-256 of the files that decide or join the output besides the tensors, by name."""
    return {
        name: hashlib.sha256(
            regular_file.read(directory / name, limit_bytes=companions.MAX_BYTES)
        ).hexdigest()
        for name in ("config.json", *companions.present(directory))
        if (directory / name).is_file()
    }


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:  # reading it will say why
        return (0, 0)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(name: str, entry: Entry) -> str:
    """SHA-256 of a tensor in its file, which is read in chunks; every number must be finite."""
    digest = _hash_of(entry)
    for start in range(entry.start, entry.stop, _CHUNK_BYTES):
        stop = min(start + _CHUNK_BYTES, entry.stop)
        chunk = Entry(entry.file, torch.uint8, (stop - start,), start, stop)
        data = read_entry(name, chunk)
        if entry.dtype.is_floating_point:
            check_finite(name, entry.file, data.view(entry.dtype))
        digest.update(data.numpy().data)
    return digest.hexdigest()


def _hash_of(entry: Entry) -> "hashlib._Hash":
    """The state of SHA-256 before a tensor's data."""
    return hashlib.sha256(f"{entry.dtype} {list(entry.shape)}\n".encode())


def _changed(path: Path, found: str, expected: str | None = None) -> CheckpointError:
    return CheckpointError(
        "the source changed while it was quantized",
        where=str(path),
        expected=expected,
        found=found,
        remedy="Run again once nothing writes to it.",
    )
