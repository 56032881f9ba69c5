"""Names of files in one folder, and where such a file may lie: in the folder or in a hub cache.

Knows nothing of what a file holds.
"""

from pathlib import Path

from qmix.errors import CheckpointError

NAME_BYTES = 255  # no file system has longer names


def is_plain_name(name: str) -> bool:
    """Whether a name is that of an entry of a directory, and leads nowhere else."""
    return (
        name not in ("", ".", "..")
        and not {"/", "\0"} & set(name)
        and len(name.encode()) <= NAME_BYTES
    )


def path_inside(folder: Path, name: str) -> Path:
    """The path of a file of `folder`. It may be a link into the blobs of a hub cache.

    Raises:
        CheckpointError: the file is missing, or is a link that leaves the folder.
    """
    path = folder / name
    try:
        target, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "a shard is missing or its link leads nowhere", where=str(path), found=str(error)
        ) from None
    blobs = home.parent.parent / "blobs"
    in_hub_cache = home.parent.name == "snapshots" and target.parent == blobs
    if target.parent != home and not in_hub_cache:
        raise CheckpointError(
            "the shard is a link that leaves the directory", where=str(path), found=str(target)
        )
    return path
