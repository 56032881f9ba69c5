"""The folders that qmix wrote for this user, so that `qmix list` finds them again.

A list of paths in the user's state folder. Losing it loses nothing else.
"""

from contextlib import suppress
from pathlib import Path

from qmix import strict_json
from qmix.errors import QmixError
from qmix.files import user_files

_FILE = "checkpoints.json"
_MOST = 1000


def remember(folder: Path) -> None:
    """Note a folder; where that cannot be written, nothing is said."""
    path = user_files.state_directory() / _FILE
    known = [*(each for each in folders() if each != folder.resolve()), folder.resolve()]
    with suppress(QmixError, OSError):
        user_files.prepare(path)
        strict_json.write(path, {"folders": list(map(str, known[-_MOST:]))}, private=True)


def folders() -> tuple[Path, ...]:
    """Those that were noted and still exist, the newest last."""
    path = user_files.state_directory() / _FILE
    if user_files.doubt(path) is not None or not path.exists():
        return ()
    try:
        listed = strict_json.read(path).get("folders")
    except QmixError:
        return ()
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return tuple(Path(name) for name in names if Path(name).is_dir())
