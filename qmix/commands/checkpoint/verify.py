"""Whether a checkpoint is intact: its files' hashes, its exact tensors, and every number in it.

Holds one weight at a time. Knows no module. A checkpoint needs no manifest, but one that is there
must be true; only the model card may be edited.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmix.commands.checkpoint import Progress
from qmix.errors import CheckpointError, QmixError
from qmix.files.regular_file import open_regular
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.files.manifest import CARD, MANIFEST, read_manifest
from qmix.formats.names import ModelTensor
from qmix.quantities import counted
from qmix.weights.dense import all_finite

_MAX_PROBLEMS = 5


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The outcome.

    Attributes:
        weights: how many were read.
        hashed: how many files the manifest lists; 0 if there is no manifest.
        problems: the first of them, in the order of reading; none if the checkpoint is intact.
    """

    weights: int
    hashed: int
    problems: tuple[QmixError, ...]

    def to_dict(self) -> dict[str, object]:
        """As a JSON document."""
        return {
            "ok": not self.problems,
            "weights": self.weights,
            "hashed": self.hashed,
            "problems": [str(problem) for problem in self.problems],
        }


def verify(directory: str | Path, progress: Progress = lambda *_: None) -> Verification:
    """Check a checkpoint directory to the last number.

    Args:
        progress: called before each file and weight, with its name, the steps done and all steps.

    Raises:
        CheckpointError: it cannot be opened: a damaged header, wrong tensors or a wrong manifest.
        UnsupportedError: its layout is not read.
    """
    checkpoint = open_checkpoint(directory)
    folder = checkpoint.shards.directory
    listed = {name: facts for name, facts in read_manifest(folder).items() if name != CARD}
    total = len(listed) + len(checkpoint.tensors)
    problems: list[QmixError] = []
    for index, (name, facts) in enumerate(listed.items()):
        progress(name, index, total)
        problems += _file_problems(folder / name, facts)
    for index, tensor in enumerate(checkpoint.tensors, len(listed)):
        progress(tensor.name, index, total)
        problems += _weight_problems(checkpoint, tensor)
    return Verification(
        weights=len(checkpoint.tensors),
        hashed=len(listed),
        problems=tuple(problems[:_MAX_PROBLEMS]),
    )


def _file_problems(path: Path, facts: dict[str, Any]) -> Iterator[QmixError]:
    if not path.is_file():
        yield CheckpointError(
            "the file is missing", where=str(path), expected=f"the file that {MANIFEST} lists"
        )
        return
    size = path.stat().st_size
    if size != facts["bytes"]:
        yield CheckpointError(
            "not the size that the manifest lists",
            where=str(path),
            expected=f"{facts['bytes']} B",
            found=f"{size} B",
        )
        return
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != facts["sha256"]:
        yield CheckpointError(
            "not the SHA-256 that the manifest lists",
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
        data = checkpoint.dense(tensor)
    except QmixError as error:
        yield error
        return
    if not all_finite(data):
        invalid = data.numel() - int(torch.isfinite(data).sum())
        yield CheckpointError(
            f"tensor {tensor.name}: holds NaN or infinity",
            where=str(checkpoint.entry(tensor.name).file),
            expected="finite values",
            found=counted(invalid, "other"),
        )
