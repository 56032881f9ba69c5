"""What an interrupted run leaves behind, and whether another may go on with it.

Knows nothing of what the work is: only settings by name, and results of finished layers.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.errors import CheckpointError, UsageError
from qmix.formats import Checkpoint
from qmix.formats.files.output_dir import STATE

_SAMPLE = 4096  # bytes of each tensor that go into the source's digest


@dataclass(frozen=True)
class State:
    """Of a run: `settings` that decide its bytes, and the `results` of the layers that are done."""

    settings: Mapping[str, Any]
    results: Sequence[Any]

    def write(self, folder: Path) -> None:
        """Replace the folder's state; the old one stands until the new one is on the disk."""
        partial = folder / f"{STATE}.writing"
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"settings": self.settings, "results": self.results}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(folder / STATE)


def read(folder: Path, settings: Mapping[str, Any]) -> State:
    """The state of `folder`: a new one if nothing has been done there.

    Raises:
        UsageError: the work that stands there was done with other settings; the first is named.
        CheckpointError: the state is damaged.
    """
    path = folder / STATE
    if not path.is_file():
        return State(settings, ())
    document = strict_json.read(path, limit_bytes=strict_json.INDEX_BYTES)
    stored, results = document.get("settings"), document.get("results")
    if not isinstance(stored, dict) or not isinstance(results, list):
        raise CheckpointError(
            "not the state of a run", where=str(path), remedy="Remove the directory and start anew."
        )
    for name in sorted(settings.keys() | stored.keys()):
        if stored.get(name) != settings.get(name):
            raise UsageError(
                f"the interrupted run had another {name}",
                where=str(path),
                expected=stored.get(name),
                found=settings.get(name),
                remedy="Give the same options, or remove the directory and start anew.",
            )
    return State(settings, tuple(results))


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over config.json, every header entry and the first 4 KiB of every tensor.

    Fine-tunes of one model have the same headers; no two have the same first bytes everywhere. The
    whole of 93 GB would take minutes.
    """
    found = hashlib.sha256((checkpoint.shards.directory / "config.json").read_bytes())
    for name, entry in sorted(checkpoint.shards.entries.items()):
        line = f"{name} {entry.dtype} {entry.shape} {entry.file.name} {entry.start}\n"
        found.update(line.encode())
        with entry.file.open("rb") as file:
            found.update(os.pread(file.fileno(), min(_SAMPLE, entry.nbytes), entry.start))
    return found.hexdigest()
