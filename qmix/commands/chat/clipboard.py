"""The clipboard: the platform's own tool, and OSC 52, which reaches through ssh and tmux.

Knows nothing of what is copied.
"""

import base64
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

_TIMEOUT_S = 3
_OSC52_BYTES = 74_994  # xterm's limit, which others have taken over: 100,000 in base64
# A tool, and the variable without which it cannot work.
_TOOLS: Sequence[tuple[Sequence[str], str | None]] = (
    (("pbcopy",), None),
    (("wl-copy",), "WAYLAND_DISPLAY"),
    (("xclip", "-selection", "clipboard"), "DISPLAY"),
    (("xsel", "--clipboard", "--input"), "DISPLAY"),
    (("clip.exe",), "WSL_DISTRO_NAME"),
    (("tmux", "load-buffer", "-w", "-"), "TMUX"),
)


def copy(
    text: str, screen: IO[str] | None, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """Copy a text, and say by which ways; none means that there is no clipboard.

    Args:
        screen: a terminal that may understand OSC 52; nobody can ask it whether it does.
    """
    ways = []
    command = tool(environment)
    if command is not None and _piped(command, text):
        ways.append(command[0])
    data = text.encode(errors="replace")
    if screen is not None and len(data) <= _OSC52_BYTES:
        with suppress(OSError):
            screen.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
            screen.flush()
            ways.append("the terminal, if it understands OSC 52")
    return ways


def tool(environment: Mapping[str, str]) -> Sequence[str] | None:
    """The command of the first tool that is there and has what it needs."""
    return next(
        (
            command
            for command, variable in _TOOLS
            if (variable is None or environment.get(variable)) and shutil.which(command[0])
        ),
        None,
    )


def _piped(command: Sequence[str], text: str) -> bool:
    """Whether the tool took the text. xclip goes on in the background: nothing waits for it."""
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(
            command,
            input=text.encode(errors="replace"),
            stdout=quiet,
            stderr=quiet,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
