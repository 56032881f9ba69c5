"""A file written whole or not at all: beside its place, forced to the disk, then renamed.

Knows nothing of what is written.
"""

import os
import secrets
from pathlib import Path


def write(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` in one step; the old file stands until the new one is on the disk.

    The new file gets the mode that the umask gives any new file. A process that is killed may leave
    `NAME.*.writing` behind; a write that fails leaves nothing.

    Raises:
        OSError: the file cannot be written; the old one, if there is one, is unchanged.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
