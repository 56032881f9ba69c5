"""An output directory that is absent, clearly partial, or complete.

All is written into `OUT.partial` under a lock, forced to the disk, listed in a manifest with a
SHA-256 a file, and renamed last. Knows nothing of tensors.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmix.errors import CheckpointError, ResourceError, UsageError

MANIFEST = "qmix_manifest.json"
_LOCK = ".lock"
# Files other than weights, and the file system's own: ample for a tokenizer and a few JSON files.
_SLACK_BYTES = 64 << 20


def check_paths(source: Path, out: Path, *, force: bool) -> None:
    """Refuse, before any work, an OUT that would harm SRC or something that stands.

    Raises:
        UsageError: OUT is SRC, lies inside it or around it, exists (without `force`), or is not a
            directory that qmix may replace.
    """
    real_source, real_out = source.resolve(), out.resolve()
    if real_out == real_source:
        raise UsageError("OUT is SRC", where=str(out), remedy="Choose another directory.")
    if real_out.is_relative_to(real_source):
        raise UsageError("OUT lies inside SRC", where=str(out), remedy="Choose another directory.")
    if real_source.is_relative_to(real_out):
        raise UsageError("SRC lies inside OUT", where=str(out), remedy="Choose another directory.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError("OUT exists and is not a directory", where=str(out))
    if not out.parent.is_dir():
        raise UsageError("the directory that is to hold OUT does not exist", where=str(out.parent))
    if out.exists() and not force:
        raise UsageError(
            "OUT exists", where=str(out), remedy="Choose another directory, or give --force."
        )
    if out.exists() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise UsageError(
            "OUT holds no checkpoint, and --force replaces only checkpoints",
            where=str(out),
            remedy="Choose another directory, or remove it yourself.",
        )
    if not os.access(out.parent, os.W_OK):
        raise UsageError("the directory that is to hold OUT is not writable", where=str(out.parent))


def check_space(out: Path, needed_bytes: int) -> None:
    """Refuse if the file system does not have the room.

    Raises:
        ResourceError: with both figures.
    """
    free = shutil.disk_usage(out.parent).free
    needed = needed_bytes + _SLACK_BYTES
    if free < needed:
        raise ResourceError(
            "not enough free disk",
            where=str(out.parent),
            expected=f"{needed / 1e9:.2f} GB",
            found=f"{free / 1e9:.2f} GB free",
            remedy=f"Free {(needed - free) / 1e9:.2f} GB or write OUT elsewhere.",
        )


@contextmanager
def partial(out: Path) -> Iterator[Path]:
    """Yield `OUT.partial`; complete it to OUT if the block ends well, remove it if not.

    A remainder of a killed run is removed first; one of a run still alive is refused.

    Raises:
        CheckpointError: another run is writing the same OUT.
        ResourceError: the disk is full.
    """
    folder = out.with_name(out.name + ".partial")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CheckpointError("another run is writing this output", where=str(folder)) from None
        _empty(folder)
        try:
            yield folder
            _complete(folder, out)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ResourceError(
                "the disk is full",
                where=str(out.parent),
                found=f"{shutil.disk_usage(out.parent).free / 1e9:.2f} GB free",
                remedy="Nothing was kept; free space and run again.",
            ) from error
        finally:
            if folder.exists():
                shutil.rmtree(folder)
    finally:
        os.close(lock)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """List every file of the folder with its size and SHA-256, after `facts`."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name in (_LOCK, MANIFEST):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    document = {**facts, "files": files}
    path = folder / MANIFEST
    with path.open("w", encoding="utf-8") as out:
        out.write(json.dumps(document, indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _complete(folder: Path, out: Path) -> None:
    (folder / _LOCK).unlink()
    _sync(folder)
    replaced = out.with_name(out.name + ".replaced")
    if out.exists():
        out.rename(replaced)
    folder.rename(out)
    _sync(out.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
