"""Checkpoints as a command is given them: a folder, a file, or a name of the hub.

Says what would be downloaded and asks. Knows no command.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qmix.commands import terminal
from qmix.errors import QmixError
from qmix.hub import source as door
from qmix.hub.download import Confirm, Download
from qmix.hub.selection import Need


def local(source: Path, *, yes: bool = False, need: Need = "model") -> Path:
    """The folder or file on this machine that a command's argument means; fetched if need be.

    Args:
        yes: download without asking.

    Raises:
        QmixError: as qmix.hub.source.resolve; or the user wants no download.
    """
    return door.resolve(source, need=need, confirm=confirmation(yes=yes))


@contextmanager
def described(source: Path, *, part: bool = False) -> Iterator[Path]:
    """The same for a command that reads headers only; see qmix.hub.source.described."""
    with door.described(source, part=part) as path:
        yield path


def confirmation(*, yes: bool) -> Confirm:
    """Says what will be fetched; on a terminal it asks, unless `yes`."""

    def confirm(download: Download) -> None:
        terminal.message(f"download {download}")
        on_terminal = sys.stdin.isatty() and sys.stderr.isatty()
        if on_terminal and not yes and not terminal.asked("Download?"):
            raise QmixError(
                "nothing was downloaded",
                where=str(download.repo),
                remedy="--yes downloads without asking.",
            )

    return confirm
