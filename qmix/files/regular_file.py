"""Reading files that somebody else wrote: regular files only, and what else is there is named.

Standard library only. Knows nothing of what a file holds.
"""

import errno
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from qmix.errors import CheckpointError, WriteError

_KINDS = (
    (stat.S_ISDIR, "a directory", "Give a file in it."),
    (stat.S_ISFIFO, "a named pipe", "Write its content to a file first."),
    (stat.S_ISCHR, "a character device", "Give a regular file."),
    (stat.S_ISBLK, "a block device", "Give a regular file."),
    (stat.S_ISSOCK, "a socket", "Give a regular file."),
)

UNREADABLE = "cannot be read"  # what an error says whose cause is the system
_DISK_ERRORS = (errno.EIO, errno.ESTALE)
_WRITERS_TURN = 0.1  # seconds that a pipe's writer gets to begin


@contextmanager
def reading(path: Path, what: str = UNREADABLE) -> Iterator[None]:
    """Turn what the system says of a file that is read into an error that names it.

    Raises:
        CheckpointError: the block raised OSError.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise unreadable(path, error, what) from error


@contextmanager
def open_regular(
    path: Path, *, what: str = UNREADABLE, missing: str | None = None
) -> Iterator[BufferedReader]:
    """Open a regular file for reading. A pipe or device is refused without waiting for it.

    Args:
        what: the failure, if the block cannot read the file.
        missing: the remedy if there is no such file.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is not a regular file; the message
            says what it is. Or the block raised OSError.
    """
    with reading(path, what), _opened(path, missing) as file:
        yield file


def _opened(path: Path, missing: str | None) -> BufferedReader:
    """The file, open; see open_regular for the errors."""
    try:
        _check_kind(path, path.stat().st_mode)  # opening a device may already have an effect
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_kind(path, os.fstat(descriptor).st_mode)
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except (FileNotFoundError, NotADirectoryError):
        what = "a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise CheckpointError(what, where=str(path), remedy=missing) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def read(path: Path, *, limit_bytes: int, missing: str | None = None) -> bytes:
    """The bytes of a regular file of at most `limit_bytes`.

    Raises:
        CheckpointError: as open_regular; the file is larger, or the disk fails while it is read.
    """
    with open_regular(path, missing=missing) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise CheckpointError(
                "file too large", where=str(path), expected=f"at most {limit_bytes} B", found=size
            )
        return file.read(size)


def read_given(path: Path, *, limit_bytes: int) -> bytes:
    """The bytes of a file that the user names: a regular one, or a pipe that is being written.

    A shell's `<(command)` is such a pipe. One that nobody writes to is refused at once.

    Raises:
        CheckpointError: as read.
    """
    with reading(path):
        pipe = exists(path) and stat.S_ISFIFO(path.stat().st_mode)
    if not pipe:
        return read(path, limit_bytes=limit_bytes)
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            # Opening it lets a writer in who has waited for a reader.
            select.select([descriptor], [], [], _WRITERS_TURN)
            start = file.read(1)  # None: there is a writer, who has written nothing yet
            os.set_blocking(descriptor, True)
            if start == b"":
                _check_kind(path, os.fstat(descriptor).st_mode)
            data = bytearray(start or b"")
            while len(data) <= limit_bytes and (chunk := file.read(1 << 20)):
                data += chunk
    if len(data) > limit_bytes:
        raise CheckpointError(
            "text too long", where=str(path), expected=f"at most {limit_bytes} B", found="more"
        )
    return bytes(data)


def exists(path: Path) -> bool:
    """Whether there is anything by this name; a name that no file can have is of nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a directory by this name."""
    try:
        return path.is_dir()
    except OSError:
        return False


def checked_folder(directory: str | Path) -> Path:
    """The path of a checkpoint's directory.

    Raises:
        CheckpointError: it is missing, or is not a directory.
    """
    folder = Path(directory)
    if is_folder(folder):
        return folder
    raise CheckpointError(
        "not a directory" if exists(folder) else "no such directory",
        where=str(folder)[:300],
        remedy="Give the folder of config.json and the safetensors files, a GGUF file, or ORG/NAME "
        "of the hub.",
    )


def unreadable(path: Path, error: OSError | ValueError, what: str = UNREADABLE) -> CheckpointError:
    """The error for a file that is there and cannot be read, or whose name is none."""
    if isinstance(error, ValueError):
        return CheckpointError("not a file name", where=str(path), found=str(error))
    remedy = None
    if isinstance(error, PermissionError):
        remedy = "Give yourself the permission to read it."
    elif error.errno is not None and error.errno in _DISK_ERRORS:
        remedy = "Check the disk or the network mount, then copy or download the file again."
    return CheckpointError(what, where=str(path), found=error.strerror, remedy=remedy)


def _check_kind(path: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    for test, kind, remedy in _KINDS:
        if test(mode):
            raise CheckpointError("not a regular file", where=str(path), found=kind, remedy=remedy)
    raise CheckpointError("not a regular file", where=str(path))
