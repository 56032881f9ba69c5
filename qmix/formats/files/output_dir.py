"""An output directory that is absent, clearly partial, or complete.

All is written into `OUT.partial` under a lock, forced to the disk, listed in a manifest with a
SHA-256 a file, and renamed last. Knows nothing of tensors.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, ResourceError, UsageError

MANIFEST = "qmix_manifest.json"
# Stands in OUT.partial from its first moment: what holds it is ours to empty.
_MARKER = ".qmix-partial"
# Stands in OUT.partial once there is work in it that --resume can go on with.
STATE = "qmix_resume.json"
# What a run did and how long it took: no two runs write the same, so the manifest leaves it out.
REPORT = "qmix_report.json"
_NAME_BYTES = 255
# Files other than weights, and the file system's own: ample for a tokenizer and a few JSON files.
_SLACK_BYTES = 64 << 20
# What a checkpoint directory may hold for --force to replace it.
_CHECKPOINT_FILES = re.compile(
    r".*\.(safetensors|json|model|jinja)|README\.md|LICENSE(\.\w+)?|\.gitattributes|\.qmix-partial"
)


def check_paths(source: Path, out: Path, *, force: bool) -> None:
    """Refuse, before any work, an OUT that would harm SRC or something that stands.

    Raises:
        UsageError: OUT or OUT.partial is SRC, lies inside it or around it; OUT exists (without
            `force`) or holds more than a checkpoint; its directory is missing or not writable.
    """
    real_source, real_out = source.resolve(), Path(os.path.abspath(out))
    for real in {real_out, real_out.resolve(), _partial_path(real_out)}:
        if real == real_source:
            raise UsageError("OUT is SRC", where=str(out), remedy="Choose another directory.")
        if real.is_relative_to(real_source):
            raise UsageError(
                "OUT lies inside SRC", where=str(out), remedy="Choose another directory."
            )
        if real_source.is_relative_to(real):
            raise UsageError(
                "SRC lies inside OUT", where=str(out), remedy="Choose another directory."
            )
    if Path.cwd().is_relative_to(real_out):
        raise UsageError("OUT is or holds the current directory", where=str(out))
    if len(os.fsencode(_partial_path(real_out).name)) > _NAME_BYTES:
        raise UsageError("the name of OUT is too long", where=str(out))
    if not real_out.parent.is_dir():
        raise UsageError(
            "the directory that is to hold OUT does not exist", where=str(real_out.parent)
        )
    if not os.access(real_out.parent, os.W_OK):
        raise UsageError(
            "the directory that is to hold OUT is not writable", where=str(real_out.parent)
        )
    if os.path.lexists(real_out):
        _check_replaceable(real_out, force=force)
    _check_partial(_partial_path(real_out))


def _partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _check_replaceable(out: Path, *, force: bool) -> None:
    if out.is_symlink() or not out.is_dir():
        raise UsageError("OUT exists and is not a directory", where=str(out))
    if not force:
        raise UsageError(
            "OUT exists", where=str(out), remedy="Choose another directory, or give --force."
        )
    entries = sorted(out.iterdir())
    strange = [p.name for p in entries if not p.is_file() or not _is_checkpoint_file(p.name)]
    if strange or (entries and not (out / "config.json").is_file()):
        raise UsageError(
            "OUT holds more than a checkpoint, and --force replaces only checkpoints",
            where=str(out),
            found=", ".join((strange or [p.name for p in entries])[:5]),
            remedy="Choose another directory, or remove it yourself.",
        )


def _is_checkpoint_file(name: str) -> bool:
    return _CHECKPOINT_FILES.fullmatch(name) is not None


def _check_partial(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    ours = folder.is_dir() and not folder.is_symlink()
    if not ours or (any(folder.iterdir()) and not (folder / _MARKER).is_file()):
        raise UsageError(
            "something that qmix did not write is in the way",
            where=str(folder),
            remedy="Move it, or choose another OUT.",
        )


def check_space(out: Path, needed_bytes: int) -> None:
    """Refuse if the file system does not have the room.

    Raises:
        ResourceError: with both figures.
    """
    free = shutil.disk_usage(out.parent).free
    partial = _partial_path(Path(os.path.abspath(out)))
    if partial.is_dir():  # what an interrupted run wrote is used again, or removed first
        free += sum(path.stat().st_size for path in partial.iterdir() if path.is_file())
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
def partial(out: Path, *, force: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield `OUT.partial`; complete it to OUT if the block ends well, remove it if not.

    The remainder of a killed run is emptied first, unless it can be resumed; that is kept, and kept
    again if the block fails. A directory that another run holds is refused.

    Args:
        resume: the caller goes on with what can be resumed; without it such a directory is refused.

    Raises:
        CheckpointError: another run is writing the same OUT.
        UsageError: something that qmix did not write is in the way, or work that can be resumed.
        ResourceError: the disk is full.
    """
    out = Path(os.path.abspath(out))
    folder = _partial_path(out)
    _check_partial(folder)
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _hold(lock, folder)
        if (folder / STATE).is_file() and not resume:
            raise UsageError(
                "an interrupted run stands there",
                where=str(folder),
                remedy="Go on with it by --resume, or remove the directory to start anew.",
            )
        try:
            (folder / _MARKER).touch()
            if not (folder / STATE).is_file():
                _empty(folder)
            yield folder
            if os.path.lexists(out):
                _check_replaceable(out, force=force)  # it may have appeared meanwhile
            _complete(folder, out)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ResourceError(
                "the disk is full",
                where=str(out.parent),
                found=f"{shutil.disk_usage(out.parent).free / 1e9:.2f} GB free",
                remedy="Free space and go on with --resume."
                if (folder / STATE).is_file()
                else "Nothing was kept; free space and run again.",
            ) from error
        finally:
            if _same(lock, folder) and not (folder / STATE).is_file():
                shutil.rmtree(folder)
    finally:
        os.close(lock)


def _hold(lock: int, folder: Path) -> None:
    """Lock the directory itself until the process ends, whatever name it has by then."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError("another run is writing this output", where=str(folder)) from None
    if not _same(lock, folder):  # it was completed between opening and locking
        raise CheckpointError("another run has just completed this output", where=str(folder))


def _same(lock: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), folder.lstat())
    except FileNotFoundError:
        return False


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """List every file of the folder with its size and SHA-256, after `facts`."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name in (_MARKER, MANIFEST, STATE, REPORT):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    strict_json.write(folder / MANIFEST, {**facts, "files": files})


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == _MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _complete(folder: Path, out: Path) -> None:
    """Rename OUT.partial to OUT; an old OUT steps aside first and goes last."""
    _sync(folder)
    aside = None
    if out.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}-replaced-", dir=out.parent))
        out.rename(aside / out.name)
    try:
        folder.rename(out)
    except OSError:
        if aside is not None:
            (aside / out.name).rename(out)
            aside.rmdir()
        raise
    (out / _MARKER).unlink()
    (out / STATE).unlink(missing_ok=True)
    _sync(out.parent)
    if aside is not None:
        shutil.rmtree(aside)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
