"""The chat's history across runs: one message a line, in the file that readline wrote before.

Knows nothing of how it is searched.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import History

from qmix.commands import terminal
from qmix.errors import QmixError
from qmix.files import atomic_file, user_files

KEPT = 1000
# Between the lines of one message. readline wrote none, so an old file is read as it was meant.
_LINE_SEPARATOR = "\u2028"
_LIBEDIT_HEADER = "_HiStOrY_V2_"  # libedit's readline writes it, and a space as \040


class HistoryFile(History):
    """The newest `KEPT` messages of a private file, to which every new one is appended."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterator[str]:
        """The newest first."""
        try:
            with self._path.open(encoding="utf-8", errors="replace", newline="\n") as file:
                lines = file.read().split("\n")
        except OSError:
            return
        if lines[0] == _LIBEDIT_HEADER:
            lines = [_libedit_decoded(line) for line in lines[1:]]
        lines = [line for line in lines if line]
        if len(lines) > 2 * KEPT:
            lines = lines[-KEPT:]
            with suppress(QmixError):
                data = "".join(f"{line}\n" for line in lines).encode()
                atomic_file.write(self._path, data, private=True)
        for line in reversed(lines[-KEPT:]):
            yield line.replace(_LINE_SEPARATOR, "\n")

    def store_string(self, string: str) -> None:
        line = string.replace("\r\n", "\n").replace("\n", _LINE_SEPARATOR) + "\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "ab", closefd=True) as file:
                file.write(line.encode("utf-8", "replace"))
        except OSError:
            terminal.message(f"qmix: cannot save the history to {self._path}")


def history_file() -> HistoryFile | None:
    """The user's history at mode 0600; None, said once, if others can have written it."""
    path = user_files.state_directory() / "chat_history"
    why = user_files.doubt(path) if os.path.lexists(path) else None
    if why is not None:
        terminal.message(f"qmix: the history is not used: {why}")
        return None
    try:
        user_files.prepare(path)
        path.touch(mode=0o600)
        path.chmod(0o600)
    except (OSError, QmixError):
        return None  # a read-only home costs the history only
    return HistoryFile(path)


def _libedit_decoded(line: str) -> str:
    return re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), line)
