"""The manifest of a checkpoint that qmix wrote: every file with its size and SHA-256.

What it lists is qmix's, and `--force` replaces nothing else. Knows nothing of tensors.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError
from qmix.files.file_errors import writing
from qmix.files.file_names import is_plain_name
from qmix.files.regular_file import reading

MANIFEST = "qmix_manifest.json"
# Lies in OUT.partial from its first moment: a directory that holds it may be emptied.
MARKER = ".qmix-partial"
# Lies in OUT.partial as soon as it holds work that --resume can continue.
STATE = "qmix_resume.json"
# What a run did and how long it took. No two runs write the same, so the manifest leaves it out.
REPORT = "qmix_report.json"
# The model card: listed, so that it is known to be ours, and not verified, because people edit it.
CARD = "README.md"
_UNLISTED = frozenset((MANIFEST, MARKER, STATE, REPORT))


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: `facts`, then every file of the folder with its size and SHA-256.

    Raises:
        WriteError: a file cannot be forced to the disk or read back.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name in _UNLISTED:
            continue
        with writing(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
    strict_json.write(folder / MANIFEST, {**facts, "files": files})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its size and hash according to the manifest; empty if there is none.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    files = strict_json.read(path).get("files")
    if not isinstance(files, dict):
        raise CheckpointError("no list of files", where=str(path), expected="files")
    for name, facts in files.items():
        if not is_plain_name(name) or not _are_facts(facts):
            raise CheckpointError(
                "not a file with its bytes and sha256", where=str(path), found=repr(name)[:80]
            )
    return files


def _are_facts(facts: object) -> bool:
    if not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
        return False
    return type(facts["bytes"]) is int and isinstance(facts["sha256"], str)


def foreign_names(folder: Path) -> list[str]:
    """The entries of a directory that no manifest in it lists, links and folders among them.

    Raises:
        CheckpointError: the directory cannot be read, or its manifest is damaged.
    """
    with reading(folder):
        entries = sorted(folder.iterdir())
        listed = read_manifest(folder)
        ours = listed.keys() | _UNLISTED if listed else frozenset()
        return [
            path.name
            for path in entries
            if path.name not in ours or path.is_symlink() or not path.is_file()
        ]


def is_complete(folder: Path) -> bool:
    """Whether a directory holds all that its manifest lists, and nothing else."""
    try:
        listed = read_manifest(folder)
        return (
            bool(listed)
            and not foreign_names(folder)
            and all((folder / name).is_file() for name in listed)
        )
    except (CheckpointError, OSError):
        return False


def remove_listed(folder: Path) -> bool:
    """Remove the files that the manifest lists, then the directory; whether it is gone.

    The manifest goes last but for the marker: a removal that was interrupted can be continued.

    Raises:
        OSError: a file cannot be removed.
    """
    for name in (*read_manifest(folder), REPORT, STATE, MANIFEST, MARKER):
        (folder / name).unlink(missing_ok=True)
    if any(folder.iterdir()):
        return False
    folder.rmdir()
    return True
