"""An output directory that is absent, clearly partial, or complete.

Everything is written into `OUT.partial` under a lock, forced to the disk, listed in a manifest with
the SHA-256 of each file, and renamed last. Knows nothing of tensors.
"""

import errno
import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmix.errors import CheckpointError, QmixError, ResourceError, UsageError, WriteError
from qmix.files.file_errors import UNSUPPORTED, reason, write_error, writing
from qmix.files.file_names import NAME_BYTES
from qmix.files.regular_file import UNREADABLE, reading
from qmix.formats.files import manifest, replacement
from qmix.formats.files.manifest import MARKER, STATE

# For files other than weights and for the file system: enough for a tokenizer and a few JSON files.
_SLACK_BYTES = 64 << 20
# What runs write into OUT.partial; nothing else in it is ever removed.
_WORK = re.compile(
    r".*\.(safetensors|gguf|json|model|jinja|f32|bf16|writing)|README\.md|qmix_report\.html|\.qmix-partial"
)


def check_paths(source: Path, out: Path, *, force: bool) -> None:
    """Refuse, before any work, an OUT that would damage SRC or anything else that exists.

    Raises:
        UsageError: OUT or OUT.partial is SRC, lies inside it or contains it; OUT exists (without
            `force`) or holds what no manifest of qmix lists; its parent is missing or not writable.
        WriteError: what an interrupted run left at OUT cannot be repaired.
    """
    with writing(out):
        _check_paths(source, out, force=force)


def _check_paths(source: Path, out: Path, *, force: bool) -> None:
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
    if len(os.fsencode(_partial_path(real_out).name)) > NAME_BYTES:
        raise UsageError("the name of OUT is too long", where=str(out))
    if not real_out.parent.is_dir():
        raise UsageError("the parent directory of OUT does not exist", where=str(real_out.parent))
    if not os.access(real_out.parent, os.W_OK):
        raise UsageError("the parent directory of OUT is not writable", where=str(real_out.parent))
    replacement.repair(real_out)
    if os.path.lexists(real_out):
        _check_replaceable(real_out, force=force)
    _check_partial(_partial_path(real_out))


def _unsuitable(what: str, out: Path) -> UsageError:
    return UsageError(what, where=str(out), remedy="Choose another directory.")


def _partial_path(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _check_replaceable(out: Path, *, force: bool) -> None:
    if out.is_symlink():
        raise UsageError(
            "OUT is a link, and --force would replace it and not what it leads to",
            where=str(out),
            found=f"a link to {os.readlink(out)}",
            remedy=f"Give {out.resolve()}.",
        )
    if not out.is_dir():
        raise UsageError(
            "OUT exists and is not a directory",
            where=str(out),
            found="a file",
            remedy="Choose another name.",
        )
    if not force:
        raise UsageError(
            "OUT exists", where=str(out), remedy="Choose another directory, or give --force."
        )
    try:
        foreign = manifest.foreign_names(out)
    except CheckpointError as error:
        if error.what == UNREADABLE:
            raise
        foreign = [str(error)]  # a damaged manifest lists nothing
    if foreign:
        raise UsageError(
            "OUT holds what qmix did not write, and --force replaces only what its manifest lists",
            where=str(out),
            found=", ".join(foreign[:5]),
            remedy="Choose another directory, or remove it yourself.",
        )


def _check_partial(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    found: list[str] = []
    if folder.is_dir() and not folder.is_symlink():
        with reading(folder):
            entries = sorted(folder.iterdir())
        found = [path.name for path in entries if not _is_work(path)]
        if not found and (not entries or (folder / MARKER).is_file()):
            return
    raise UsageError(
        "something that qmix did not write is in the way",
        where=str(folder),
        found=", ".join(found[:5]) or None,
        remedy="Move it, or choose another OUT.",
    )


def _is_work(path: Path) -> bool:
    return _WORK.fullmatch(path.name) is not None and not path.is_symlink() and path.is_file()


def check_space(out: Path, needed_bytes: int) -> None:
    """Raise if the file system has less free space than needed.

    Raises:
        ResourceError: it has less; both figures are named.
    """
    with writing(out.parent):
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
        force: replace what a manifest lists at `out`.
        resume: the caller continues work that can be resumed; without it such work is refused.

    Raises:
        CheckpointError: another run is writing the same OUT; a file of the block cannot be read.
        UsageError: something that qmix did not write is in the way, or work that can be resumed.
        WriteError: a file cannot be written; it says what is kept.
    """
    out = Path(os.path.abspath(out))
    folder = _partial_path(out)
    with writing(folder):
        replacement.repair(out)
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
            (folder / MARKER).touch()
            if not (folder / STATE).is_file():
                _empty(folder)
            yield folder
            if os.path.lexists(out):
                _check_replaceable(out, force=force)  # it may have appeared meanwhile
            old = replacement.put_in_place(folder, out)
        except OSError as error:
            raise _failed(error, folder) from error
        finally:
            if _is_same(descriptor, folder) and not (folder / STATE).is_file():
                _remove(folder)
        try:
            replacement.finish(out, old)
        except OSError as error:
            raise write_error(out, error, "OUT is complete and stands.") from error
    finally:
        with suppress(OSError):  # nothing was written through it
            os.close(descriptor)


def _failed(error: OSError, folder: Path) -> QmixError:
    """What the user is told of a run that the system stopped."""
    name = None if isinstance(error, WriteError) else error.filename
    if name is not None and not _is_near(Path(os.fsdecode(name)), folder):
        return CheckpointError(UNREADABLE, where=os.fsdecode(name), found=reason(error))
    kept = "Nothing of this run was kept."
    if (folder / STATE).is_file():
        kept = "The finished layers are kept: continue with --resume."
    return write_error(folder, error, kept)


def _is_near(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) or path.is_relative_to(folder.with_suffix(""))


def _lock(descriptor: int, folder: Path) -> None:
    """Lock the directory itself until the process ends, whatever its name is by then."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError("another run is writing this output", where=str(folder)) from None
        if error.errno not in UNSUPPORTED:
            raise write_error(folder, error) from error
        warnings.warn(
            f"{folder.parent}: this file system has no locks ({reason(error)}); give no other run "
            "the same OUT",
            stacklevel=2,
        )
    if not _is_same(descriptor, folder):  # it was completed between opening and locking
        raise CheckpointError("another run has just completed this output", where=str(folder))


def _is_same(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def total_bytes(folder: Path) -> int:
    """Bytes of the files in the folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _empty(folder: Path) -> None:
    """Remove what an earlier run left, all but the marker; `_check_partial` has seen the rest."""
    for path in folder.iterdir():
        if path.name != MARKER and _is_work(path):
            path.unlink()


def _remove(folder: Path) -> None:
    """Remove a run's own files and its directory, as far as the system allows."""
    with suppress(OSError):
        _empty(folder)
        (folder / MARKER).unlink(missing_ok=True)
        folder.rmdir()
