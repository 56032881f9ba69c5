"""What the system says when a file cannot be written, as errors that name the file.

Knows nothing of what a file holds.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmix.errors import WriteError

FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
# What file systems answer that cannot do what is asked: vboxsf, CIFS, FUSE, Lustre, some NFS.
UNSUPPORTED = frozenset(
    (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK)
)
_REMEDIES = {
    **dict.fromkeys(FULL, "Free space, or write elsewhere."),
    errno.EFBIG: "The file system or a limit of the process (ulimit -f) allows no larger file.",
    errno.EROFS: "The file system is mounted read-only: write elsewhere.",
    errno.ESTALE: "The network file system has lost the file: mount it again.",
    errno.EIO: "The disk or its connection fails: see the system's log (dmesg).",
    errno.EACCES: "Check the owner and the permissions.",
    errno.EPERM: "Check the owner and the permissions.",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a file that is written into an error that names it.

    Raises:
        WriteError: the block raised OSError; one that names a file already keeps its name.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError, kept: str | None = None) -> WriteError:
    """The error that says which file could not be written, why, and what to do.

    Args:
        path: of the file, where `error` names none.
        kept: a sentence on what stands after the failure.
    """
    where = error.where if isinstance(error, WriteError) else error.filename
    remedy = _REMEDIES.get(error.errno or 0, "Write elsewhere.")
    failed = WriteError(
        "cannot be written",
        where=str(path) if where is None else os.fsdecode(where),
        found=reason(error),
        remedy=f"{kept} {remedy}" if kept else remedy,
    )
    failed.errno, failed.strerror = error.errno, reason(error)
    return failed


def reason(error: OSError) -> str:
    """What the system says, in words."""
    return error.strerror or str(error) or type(error).__name__


def sync_directory(folder: Path) -> None:
    """Force the names in a directory to the disk, where the file system can.

    Raises:
        OSError: the disk fails. A file system that cannot do it at all is no error.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return  # a directory that may be written and not be read
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
