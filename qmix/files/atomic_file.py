"""A file written whole or not at all: beside its place, forced to the disk, then renamed.

Knows nothing of what is written.
"""

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from qmix.files.file_errors import reason, writing

_FOR_ALL, _FOR_THE_OWNER = 0o666, 0o600


def made_folder(directory: str | Path) -> Path:
    """The directory as a path, made with those above it where it is missing.

    Raises:
        WriteError: it cannot be made, or a file is in its way.
    """
    folder = Path(directory)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(path: Path, data: bytes | memoryview, *, private: bool = False) -> None:
    """`write_parts` of one part."""
    write_parts(path, (data,), private=private)


def write_parts(path: Path, parts: Iterable[bytes | memoryview], *, private: bool = False) -> None:
    """Replace `path` in one step; the old file stands until the new one is on the disk.

    A link at `path` is replaced, not followed. A process that is killed may leave `NAME.*.writing`
    behind; a write that fails leaves nothing.

    Args:
        private: only the owner may read the file; otherwise it gets the mode of any new file.

    Raises:
        WriteError: the file cannot be written; the old one, if there is one, is unchanged.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with writing(path):
        try:
            descriptor = os.open(partial, flags, _FOR_THE_OWNER if private else _FOR_ALL)
            with os.fdopen(descriptor, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException as error:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            if isinstance(error, OSError):  # the name beside it says nothing to the user
                raise OSError(error.errno, reason(error)) from error
            raise
