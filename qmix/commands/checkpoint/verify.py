"""Whether a checkpoint is whole: its files' hashes, its exact tensor set, and every number in it.

Holds one weight at a time. Knows no module, and trusts no manifest: one that is there must hold.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files.output_dir import MANIFEST
from qmix.formats.names import ModelTensor

PROBLEMS = 5


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a verification is: steps done (files to hash, then weights) and what comes next."""

    done: int
    total: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome.

    Attributes:
        weights: how many were read.
        hashed: how many files the manifest vouched for; 0 if there is no manifest.
        problems: the first of them, in the order of reading; none if all is well.
    """

    weights: int
    hashed: int
    problems: tuple[QmixError, ...]


def verify(directory: str | Path, progress: Callable[[Progress], None] = lambda _: None) -> Verdict:
    """Check a checkpoint directory to the last number.

    Raises:
        CheckpointError: it cannot be opened: a damaged header, a wrong tensor set or manifest.
        UnsupportedError: its layout is not read.
    """
    checkpoint = open_checkpoint(directory)
    listed = _listed(checkpoint.shards.directory)
    total = len(listed) + len(checkpoint.tensors)
    problems: list[QmixError] = []
    for index, (name, facts) in enumerate(listed.items()):
        progress(Progress(done=index, total=total, name=name))
        problems += _file_problems(checkpoint.shards.directory / name, facts)
    for index, tensor in enumerate(checkpoint.tensors):
        progress(Progress(done=len(listed) + index, total=total, name=tensor.name))
        problems += _weight_problems(checkpoint, tensor)
    return Verdict(
        weights=len(checkpoint.tensors), hashed=len(listed), problems=tuple(problems[:PROBLEMS])
    )


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> its size and hash, of the manifest; empty if there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    files = strict_json.read(path).get("files")
    if not isinstance(files, dict):
        raise CheckpointError("no list of files", where=str(path), expected="files")
    for name, facts in files.items():
        plain = name == Path(name).name and "\0" not in name
        if not plain or not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
            raise CheckpointError(
                "not a file with its bytes and sha256", where=str(path), found=repr(name)[:80]
            )
    return files


def _file_problems(path: Path, facts: dict[str, Any]) -> Iterator[QmixError]:
    if not path.is_file():
        yield CheckpointError("the file is missing", where=str(path), expected=f"as in {MANIFEST}")
        return
    size = path.stat().st_size
    if size != facts["bytes"]:
        yield CheckpointError(
            "another size than the manifest's",
            where=str(path),
            expected=f"{facts['bytes']} B",
            found=f"{size} B",
        )
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != facts["sha256"]:
        yield CheckpointError(
            "another SHA-256 than the manifest's",
            where=str(path),
            expected=facts["sha256"],
            found=digest,
            remedy="The file was changed or damaged after it was written.",
        )


def _weight_problems(checkpoint: Checkpoint, tensor: ModelTensor) -> Iterator[QmixError]:
    try:
        if checkpoint.packed(tensor):
            checkpoint.weight(tensor)  # its reader checks shapes, scales and indices
            return
        data = checkpoint.read(tensor.name)
    except QmixError as error:
        yield error
        return
    wrong = data.numel() - int(torch.isfinite(data).sum())
    if wrong:
        yield CheckpointError(
            f"tensor {tensor.name}: holds NaN or infinity",
            where=str(checkpoint.entry(tensor.name).file),
            expected="finite values",
            found=f"{wrong} others",
        )
