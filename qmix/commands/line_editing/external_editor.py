"""A text edited in the user's own editor. Knows no prompt."""

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO

from qmix.errors import UsageError

_FALLBACKS = ("nano", "vim", "vi", "emacs")


def edited(text: str, screen: IO[str] | None = None) -> str:
    """The text as $VISUAL, $EDITOR or the first known editor leaves it, without its last newline.

    Args:
        screen: a terminal for the editor to draw on, where stdout is none.

    Raises:
        UsageError: there is no editor, or it failed.
    """
    command = _editor()
    with tempfile.TemporaryDirectory(prefix="qmix-") as folder:
        path = Path(folder, "message.md")
        path.write_text(text + "\n", encoding="utf-8")
        try:
            code = subprocess.run([*command, str(path)], stdout=screen, check=False).returncode
        except OSError as error:
            raise UsageError(
                "the editor does not start", where=command[0], found=error.strerror
            ) from None
        if code:
            raise UsageError("the editor failed", where=command[0], found=f"exit code {code}")
        return path.read_text(encoding="utf-8", errors="replace").removesuffix("\n")


def _editor() -> list[str]:
    for variable in ("VISUAL", "EDITOR"):
        if words := shlex.split(os.environ.get(variable, "")):
            return words
    found = next((name for name in _FALLBACKS if shutil.which(name)), None)
    if found is None:
        raise UsageError("there is no editor", remedy="Set $EDITOR.")
    return [found]
