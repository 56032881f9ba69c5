"""How OUT.partial becomes OUT: by one rename, or in exchange with the old OUT.

An interruption at any moment leaves the old or the new output at OUT, or an old one set aside that
`repair` puts back. Knows no lock of a run and nothing of what an output holds but its manifest.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qmix.files.file_errors import UNSUPPORTED, sync_directory
from qmix.formats.files import manifest
from qmix.formats.files.manifest import MARKER, STATE

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2


def put_in_place(folder: Path, out: Path) -> Path | None:
    """Rename OUT.partial to OUT; returns where an old OUT now lies, marked for removal.

    Raises:
        OSError: it cannot be renamed. What OUT was before, it still is.
    """
    sync_directory(folder)
    if not os.path.lexists(out):
        folder.rename(out)
        return None
    (out / MARKER).touch()
    try:
        return folder if _exchanged(folder, out) else _set_aside(folder, out)
    except OSError:
        (out / MARKER).unlink(missing_ok=True)
        raise


def finish(out: Path, old: Path | None) -> None:
    """Remove what a completed run no longer needs: its marker and state, and the old output.

    Raises:
        OSError: something cannot be removed or forced to the disk. OUT is complete all the same.
    """
    (out / STATE).unlink(missing_ok=True)
    (out / MARKER).unlink(missing_ok=True)
    sync_directory(out.parent)
    if old is not None:
        _remove(old)
        if old.parent != out.parent:
            _remove_aside(old.parent)


def repair(out: Path) -> None:
    """Complete what an interrupted run left undone at OUT: its last removals, or its replacement.

    Raises:
        OSError: something cannot be renamed or removed.
    """
    if (out / MARKER).is_file() and manifest.is_complete(out):
        (out / STATE).unlink(missing_ok=True)
        (out / MARKER).unlink(missing_ok=True)
    aside = _aside(out)
    if aside.is_symlink() or not aside.is_dir():
        return
    with _locked(aside) as free:
        if not free or (any(aside.iterdir()) and not (aside / MARKER).is_file()):
            return
        old = aside / out.name
        if old.is_dir() and not os.path.lexists(out):
            old.rename(out)
            (out / MARKER).unlink(missing_ok=True)
            warnings.warn(
                f"{out}: an interrupted run had set it aside in {aside.name}; it is back",
                stacklevel=2,
            )
        elif old.is_dir():
            _remove(old)
        _remove_aside(aside)


def _exchanged(folder: Path, out: Path) -> bool:
    """Exchange two directories in one step; False where the system cannot."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if exchange(_HERE, os.fsencode(folder), _HERE, os.fsencode(out), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED or number == errno.EPERM:
        return False
    raise OSError(number, os.strerror(number), str(out))


def _set_aside(folder: Path, out: Path) -> Path:
    """Replace OUT by two renames; between them it lies in a directory that `repair` knows."""
    aside = _aside(out)
    aside.mkdir(exist_ok=True)
    with _locked(aside):
        (aside / MARKER).touch()
        old = aside / out.name
        out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            old.rename(out)
            _remove_aside(aside)
            raise
    return old


def _aside(out: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]
    return out.with_name(f".qmix-replaced-{digest}")


def _remove_aside(aside: Path) -> None:
    (aside / MARKER).unlink(missing_ok=True)
    if not any(aside.iterdir()):
        aside.rmdir()


def _remove(old: Path) -> None:
    if not manifest.remove_listed(old):
        warnings.warn(
            f"{old}: files that qmix did not write came into the old output; they are left here",
            stacklevel=2,
        )


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on a directory; False if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            yield error.errno in UNSUPPORTED
        else:
            yield True
    finally:
        with suppress(OSError):  # nothing was written through it
            os.close(descriptor)
