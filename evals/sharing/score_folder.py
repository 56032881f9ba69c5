"""Scores of batches in a folder, one file each, so that a run that was ended goes on.

A file appears whole or not at all, and holds the name of the run it belongs to. One that does not
fit is computed again. Knows no process.
"""

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qmix.evals.quality.token_scores import TokenScores
from qmix.evals.quality.windows import ScoringWindows
from qmix.evals.sharing.batches import flat, unflat
from qmix.files import atomic_file
from qmix.generation.prompt_cache import checkpoint_name

_SUFFIX = ".npz"


def run_name(models: Sequence[Path], windows: ScoringWindows, computed: Sequence[object]) -> str:
    """A name that differs wherever a score could.

    Args:
        models: all of them, the reference last.
        computed: what else decides the numbers: dtype, device, backend, releases.
    """
    digest = hashlib.sha256()
    for part in (*map(checkpoint_name, models), *map(str, computed), windows.protocol):
        digest.update(part.encode() + b"\0")
    for tensor in (windows.ids, windows.scored):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


class ScoreFolder:
    """The finished batches of one run, for each of its models.

    Args:
        folder: made if it is missing; it may hold other runs too.
        name: see `run_name`.

    Raises:
        WriteError: the folder cannot be made.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = atomic_file.made_folder(folder / name[:32])

    def read(self, batch: range) -> list[TokenScores] | None:
        """The scores of a batch by each model; None if they are not there, or are damaged."""
        try:
            data = io.BytesIO(self._path(batch).read_bytes())
            with np.load(data, allow_pickle=False) as file:
                columns = [torch.from_numpy(file[name]) for name in file.files]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        models = int(columns.pop(0)) if columns else 0
        if not models or len(columns) % models or len(columns) // models not in (4, 7):
            return None
        each = len(columns) // models
        return [unflat(columns[start : start + each]) for start in range(0, len(columns), each)]

    def write(self, batch: range, scores: Sequence[TokenScores]) -> None:
        """Keep the scores of a batch by each model.

        Raises:
            WriteError: the file cannot be written.
        """
        columns = [column.numpy() for one in scores for column in flat(one)]
        buffer = io.BytesIO()
        np.savez(buffer, np.array(len(scores)), *columns)
        atomic_file.write(self._path(batch), buffer.getbuffer())

    def _path(self, batch: range) -> Path:
        return self._folder / f"{batch.start:08}-{batch.stop:08}{_SUFFIX}"
