"""A path on this machine as the checkpoint that it means: a hub cache's folder is its snapshot.

The hub's cache keeps `models--ORG--NAME` with `refs` (a name -> a commit), `snapshots/COMMIT` and
`blobs`. Knows no network and no torch.
"""

from pathlib import Path

from qmix.errors import CheckpointError
from qmix.files import regular_file
from qmix.files.file_names import visible

PREFIX = "models--"
_COMMIT_SHOWN = 7


def snapshot_of(folder: Path) -> Path:
    """The snapshot that a model's folder in a hub's cache stands for; any other folder is itself.

    Raises:
        CheckpointError: it holds no snapshot, or several of which none is the main one; or it is
            a cache of many models.
    """
    if regular_file.exists(folder / "config.json"):
        return folder
    if folder.name == "snapshots":
        folder = folder.parent
    snapshots = folder / "snapshots"
    if regular_file.is_folder(snapshots):
        return _snapshot(folder, snapshots)
    if models := [path for path in visible(folder, f"{PREFIX}*") if path.is_dir()]:
        raise CheckpointError(
            "the cache of a hub, and not a checkpoint",
            where=str(folder),
            expected="a folder with config.json and safetensors files, or a GGUF file",
            found=", ".join(path.name for path in models[:5]),
            remedy=f"Give a model's name: {repository_of(models[0])}",
        )
    return folder


def repository_of(folder: Path) -> str:
    """ORG/NAME of the folder `models--ORG--NAME`."""
    return folder.name.removeprefix(PREFIX).replace("--", "/")


def shown_name(path: Path) -> str:
    """How a checkpoint is called: its folder's name, or ORG/NAME@COMMIT of a hub's snapshot."""
    real = path.resolve()
    for folder in (real, real.parent):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith(PREFIX):
            return f"{repository_of(folder.parent.parent)}@{folder.name[:_COMMIT_SHOWN]}"
    return real.name


def _snapshot(folder: Path, snapshots: Path) -> Path:
    present = [path for path in visible(snapshots, "*") if path.is_dir()]
    main = folder / "refs" / "main"
    if regular_file.exists(main):
        commit = regular_file.read(main, limit_bytes=200).decode("ascii", "replace").strip()
        if chosen := [path for path in present if path.name == commit]:
            return chosen[0]
    if len(present) == 1:
        return present[0]
    raise CheckpointError(
        "several snapshots of a model" if present else "a model's cache without a snapshot",
        where=str(snapshots),
        expected="one snapshot, or the one that refs/main names",
        found=", ".join(path.name for path in present[:5]) or None,
        remedy="Give one of them." if present else "Download the model again.",
    )
