"""What an interrupted run leaves behind, and whether another run may continue it.

Knows settings by name and the results of finished layers; knows nothing of the work itself.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.formats import Checkpoint
from qmix.formats.files.output_dir import STATE

_SAMPLE_BYTES = 4096  # of each tensor, for the digest of the source


@dataclass(frozen=True)
class RunState:
    """The state of a run.

    Attributes:
        settings: what decides the bytes of the result.
        results: of the layers that are finished.
    """

    settings: Mapping[str, Any]
    results: Sequence[Any]

    def write(self, folder: Path) -> None:
        """Replace the folder's state; the old one stays until the new one is on the disk."""
        document = {"settings": self.settings, "results": self.results}
        strict_json.write(folder / STATE, document, indent=None)


def read_state(folder: Path, settings: Mapping[str, Any]) -> RunState:
    """The state of `folder`, or a new one if no layer has been finished there.

    Raises:
        UsageError: the finished layers were made with other settings; the first one that differs
            is named.
        CheckpointError: the state is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return RunState(settings, ())
    document = strict_json.read(path, limit_bytes=strict_json.INDEX_BYTES)
    stored, results = document.get("settings"), document.get("results")
    if not isinstance(stored, dict) or not isinstance(results, list):
        raise CheckpointError(
            "not the state of a run",
            where=str(path),
            remedy="Remove the directory and start again.",
        )
    for name in sorted(settings.keys() | stored.keys()):
        if stored.get(name) != settings.get(name):
            raise UsageError(
                f"the interrupted run had another {name}",
                where=str(path),
                expected=stored.get(name),
                found=settings.get(name),
                remedy="Give the same options, or remove the directory and start again.",
            )
    return RunState(settings, tuple(results))


def source_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json, every header entry and the first 4 KiB of every tensor.

    Fine-tunes of one model have the same headers, but no two have the same first bytes everywhere.
    Reading all of 93 GB would take minutes.
    """
    digest = hashlib.sha256((checkpoint.shards.directory / "config.json").read_bytes())
    for name, entry in sorted(checkpoint.shards.entries.items()):
        line = f"{name} {entry.dtype} {entry.shape} {entry.file.name} {entry.start}\n"
        digest.update(line.encode())
        with entry.file.open("rb") as file:
            digest.update(os.pread(file.fileno(), min(_SAMPLE_BYTES, entry.nbytes), entry.start))
    return digest.hexdigest()
