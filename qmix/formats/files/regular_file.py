"""Opening files that somebody else wrote: no pipes, no devices, no links out of the folder.

Knows nothing of what a file holds.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from qmix.errors import CheckpointError


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A pipe or device is refused without waiting for it.

    Raises:
        CheckpointError: the file cannot be read, or is not a regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError("cannot be read", where=str(path), found=error.strerror) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError("not a regular file", where=str(path))
    return os.fdopen(descriptor, "rb")


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file of `folder`. It may be a link into the blobs of a hub cache.

    Raises:
        CheckpointError: the file is missing, or is a link that leaves the folder.
    """
    path = folder / name
    try:
        target, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "a shard is missing or its link leads nowhere", where=str(path), found=str(error)
        ) from None
    blobs = home.parent.parent / "blobs"
    in_hub_cache = home.parent.name == "snapshots" and target.parent == blobs
    if target.parent != home and not in_hub_cache:
        raise CheckpointError(
            "the shard is a link that leaves the directory", where=str(path), found=str(target)
        )
    return path
