"""Names of files in one folder: which are plain, which are seen, and which lead somewhere.

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


def is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot.

    macOS leaves `._NAME` beside every NAME on foreign disks and in archives, and `.DS_Store`.
    """
    return path.name.startswith(".")


def visible(folder: Path, pattern: str) -> list[Path]:
    """The paths in a folder that match a pattern, sorted, without hidden ones."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path))


def existing(folder: Path, name: str) -> Path:
    """The path of a file of `folder`, which may be a link: into a hub's cache or anywhere else.

    Raises:
        CheckpointError: the file is missing, or its link leads nowhere.
    """
    path = folder / name
    try:
        path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            "a shard is missing or its link leads nowhere",
            where=str(path),
            found=str(error),
            remedy="Download it again.",
        ) from None
    return path
