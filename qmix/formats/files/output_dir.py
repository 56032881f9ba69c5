"""An output directory that is absent, clearly partial, or complete.

Everything is written into `OUT.partial` under a lock, forced to the disk, listed in a manifest with
the SHA-256 of each file, and renamed last. Knows nothing of tensors.
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
# Lies in OUT.partial from its first moment: a directory that holds it may be emptied.
_MARKER = ".qmix-partial"
# Lies in OUT.partial as soon as it holds work that --resume can continue.
STATE = "qmix_resume.json"
# What a run did and how long it took. No two runs write the same, so the manifest leaves it out.
REPORT = "qmix_report.json"
_NAME_BYTES = 255
# For files other than weights and for the file system: enough for a tokenizer and a few JSON files.
_SLACK_BYTES = 64 << 20
# The only files that a directory may hold if --force is to replace it.
_CHECKPOINT_FILES = re.compile(
    r".*\.(safetensors|json|model|jinja)|README\.md|LICENSE(\.\w+)?|\.gitattributes|\.qmix-partial"
)


def check_paths(source: Path, out: Path, *, force: bool) -> None:
    """Refuse, before any work, an OUT that would damage SRC or anything else that exists.

    Raises:
        UsageError: OUT or OUT.partial is SRC, lies inside it or contains it; OUT exists (without
            `force`) or holds more than a checkpoint; its parent is missing or not writable.
    """
    real_source, real_out = source.resolve(), Path(os.path.abspath(out))
    for real in {real_out, real_out.resolve(), _partial_path(real_out)}:
        if real == real_source:
            raise _unsuitable("OUT is SRC", out)
        if real.is_relative_to(real_source):
            raise _unsuitable("OUT lies inside SRC", out)
        if real_source.is_relative_to(real):
            raise _unsuitable("SRC lies inside OUT", out)
    if Path.cwd().is_relative_to(real_out):
        raise _unsuitable("OUT is or contains the current directory", out)
    if len(os.fsencode(_partial_path(real_out).name)) > _NAME_BYTES:
        raise UsageError("the name of OUT is too long", where=str(out))
    if not real_out.parent.is_dir():
        raise UsageError("the parent directory of OUT does not exist", where=str(real_out.parent))
    if not os.access(real_out.parent, os.W_OK):
        raise UsageError("the parent directory of OUT is not writable", where=str(real_out.parent))
    if os.path.lexists(real_out):
        _check_replaceable(real_out, force=force)
    _check_partial(_partial_path(real_out))


def _unsuitable(what: str, out: Path) -> UsageError:
    return UsageError(what, where=str(out), remedy="Choose another directory.")


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
    foreign = [p.name for p in entries if not p.is_file() or not _is_checkpoint_file(p.name)]
    if foreign or (entries and not (out / "config.json").is_file()):
        raise UsageError(
            "OUT holds more than a checkpoint, and --force replaces only checkpoints",
            where=str(out),
            found=", ".join((foreign or [p.name for p in entries])[:5]),
            remedy="Choose another directory, or remove it yourself.",
        )


def _is_checkpoint_file(name: str) -> bool:
    return _CHECKPOINT_FILES.fullmatch(name) is not None


def _check_partial(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    is_directory = folder.is_dir() and not folder.is_symlink()
    if not is_directory or (any(folder.iterdir()) and not (folder / _MARKER).is_file()):
        raise UsageError(
            "something that qmix did not write is in the way",
            where=str(folder),
            remedy="Move it, or choose another OUT.",
        )


def check_space(out: Path, needed_bytes: int) -> None:
    """Raise if the file system has less free space than needed.

    Raises:
        ResourceError: it has less; both figures are named.
    """
    free = shutil.disk_usage(out.parent).free
    partial = _partial_path(Path(os.path.abspath(out)))
    if partial.is_dir():  # an interrupted run's files are used again, or removed first
        free += total_bytes(partial)
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
    """Yield `OUT.partial`; rename it to OUT if the block succeeds, remove it if not.

    What a killed run left behind is removed first. Work that can be resumed is not: it stays, even
    if the block fails.

    Args:
        force: replace an existing checkpoint at `out`.
        resume: the caller continues work that can be resumed; without it such work is refused.

    Raises:
        CheckpointError: another run is writing the same OUT.
        UsageError: something that qmix did not write is in the way, or work that can be resumed.
        ResourceError: the disk is full.
    """
    out = Path(os.path.abspath(out))
    folder = _partial_path(out)
    _check_partial(folder)
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, folder)
        if (folder / STATE).is_file() and not resume:
            raise UsageError(
                "an interrupted run left its work here",
                where=str(folder),
                remedy="Continue it with --resume, or remove the directory to start over.",
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
                remedy="Free space and continue with --resume."
                if (folder / STATE).is_file()
                else "Nothing was kept: free space and run again.",
            ) from error
        finally:
            if _is_same(descriptor, folder) and not (folder / STATE).is_file():
                shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """Lock the directory itself until the process ends, whatever its name is by then."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise CheckpointError("another run is writing this output", where=str(folder)) from None
    if not _is_same(descriptor, folder):  # it was completed between opening and locking
        raise CheckpointError("another run has just completed this output", where=str(folder))


def _is_same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: `facts`, then every file of the folder with its size and SHA-256."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name in (_MARKER, MANIFEST, STATE, REPORT):
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    strict_json.write(folder / MANIFEST, {**facts, "files": files})


def total_bytes(folder: Path) -> int:
    """Bytes of the files in the folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name == _MARKER:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _complete(folder: Path, out: Path) -> None:
    """Rename OUT.partial to OUT. An old OUT is moved aside first, and removed last."""
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
