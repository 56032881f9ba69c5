"""Files that qmix keeps for its user and reads back: compiled kernels, measurements, heat, history.

One is read back only if nobody but the user and root can have written it. Knows nothing of what
the files hold.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

from qmix.errors import CheckpointError, QmixError
from qmix.files.file_errors import writing


class Keyed(Protocol):
    """An entry of a file that holds one for each key."""

    @property
    def key(self) -> object:
        """What another entry of the file must not share."""


Entry = TypeVar("Entry", bound=Keyed)

# The file, its directory and the one above may not be links. A home behind a link is common.
_WITHOUT_LINKS = 3
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def cache_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_CACHE_HOME/qmix`, or `~/.cache/qmix`; a relative variable is ignored, as XDG asks."""
    return _directory(environment, "XDG_CACHE_HOME", Path(".cache"))


def state_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """`$XDG_STATE_HOME/qmix`, or `~/.local/state/qmix`; a relative variable is ignored."""
    return _directory(environment, "XDG_STATE_HOME", Path(".local", "state"))


def _directory(environment: Mapping[str, str], variable: str, default: Path) -> Path:
    base, home = environment.get(variable, ""), environment.get("HOME", "")
    if os.path.isabs(base):
        return Path(base) / "qmix"
    return (Path(home) if os.path.isabs(home) else _home_of_account()) / default / "qmix"


def _home_of_account() -> Path:
    """The home of the user's account, whatever HOME says."""
    import pwd

    try:
        return Path("/", pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:  # a number without an account, as in a container
        return Path("/")


def doubt(path: Path) -> str | None:
    """Why a file may not be read back; None if only the user and root can have written it.

    A file that is missing is no reason. Every directory on the way to it must belong to the user or
    root, and nobody else may write to it, but for sticky ones such as /tmp.
    """
    if not path.is_absolute():
        return f"{path} is not an absolute path"
    for part in (path, *path.parents)[:_WITHOUT_LINKS]:
        if part.is_symlink():
            return f"{part} is a link to {os.path.realpath(part)}"
    try:
        for part in _parts(path):
            found = part.stat()
            if found.st_uid not in (0, os.geteuid()):
                return f"{part} belongs to another user"
            sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
            if found.st_mode & _WRITABLE_BY_OTHERS and not sticky:
                return f"others can write to {part}"
            if part == path and not stat.S_ISREG(found.st_mode):
                return f"{part} is not a regular file"
    except OSError as error:
        return f"{error.filename} cannot be looked at ({error.strerror})"
    return None


def check(path: Path) -> None:
    """Refuse to read a file back that others can have written.

    Raises:
        CheckpointError: there is a `doubt`.
    """
    why = doubt(path)
    if why is not None:
        raise CheckpointError("may come from another user", where=str(path), found=why)


def _parts(path: Path) -> Iterator[Path]:
    """The directories that lead to a file, as named and as they lie, and the file if it exists."""
    yield from {*path.parents, *Path(os.path.realpath(path.parent), path.name).parents}
    if path.exists():
        yield path


def with_entry(read: Callable[[], Sequence[Entry]], entry: Entry) -> list[Entry]:
    """The entries of a file but an earlier one of the same key, then `entry`.

    Args:
        read: all entries; a file that it refuses counts as empty.
    """
    others: Sequence[Entry] = ()
    with suppress(QmixError):
        others = read()
    return [*(each for each in others if each.key != entry.key), entry]


def prepare(path: Path) -> None:
    """Make the missing directories of a file, for the user alone.

    Raises:
        WriteError: they cannot be made, or others could change what lies there.
    """
    with writing(path):
        for folder in reversed(path.parents):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)
        if not path.parent.is_dir():
            reason = os.strerror(errno.ENOTDIR)
            raise NotADirectoryError(errno.ENOTDIR, reason, str(path.parent))
        why = doubt(path.with_name(".none"))
        if why is not None:
            trust = f"what lies there cannot be trusted: {why}"
            raise PermissionError(errno.EPERM, trust, str(path.parent))
