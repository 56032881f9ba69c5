"""The one door to a checkpoint: whatever names it becomes a path on this machine.

Knows no torch and nothing of what the files hold.
"""

from pathlib import Path
from typing import Literal

from qmix.files import regular_file
from qmix.hub import other_folders
from qmix.hub.local import snapshot_of

# What a caller will read: the weights too, or only the tokenizer, or the configuration files.
Need = Literal["model", "tokenizer", "config"]


def resolve(source: str | Path, *, need: Need = "model") -> Path:
    """The folder or file on this machine that a checkpoint's name means.

    Args:
        source: a folder, a GGUF file, or the folder of a model in a hub's cache.

    Raises:
        CheckpointError: it is something else than a checkpoint, and clear what.
    """
    path = Path(source)
    if regular_file.is_folder(path):
        folder = snapshot_of(path)
        if need == "model" and not regular_file.exists(folder / other_folders.CONFIG):
            other_folders.check(folder)
        return folder
    if need == "model" and regular_file.exists(path):
        other_folders.check_file(path)
    return path
