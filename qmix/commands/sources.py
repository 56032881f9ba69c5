"""Checkpoints as a command is given them: a folder, a file, or a name that a folder is found for.

Knows no command.
"""

from pathlib import Path

from qmix.hub.source import resolve


def local(source: Path, *, part: bool = False) -> Path:
    """The folder or file on this machine that a command's argument means.

    Args:
        part: a file of a checkpoint's folder is accepted too.

    Raises:
        CheckpointError: as qmix.hub.source.resolve.
    """
    return resolve(source, need="config" if part else "model")
