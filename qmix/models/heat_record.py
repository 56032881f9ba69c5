"""A model's heat from one run to the next: read at the start, written when its store goes.

It decides which experts are loaded first, and never an output.
"""

import warnings
from pathlib import Path
from weakref import finalize

import torch

from qmix.errors import WriteError
from qmix.experts import heat_file
from qmix.experts.disk_store import DiskStore
from qmix.experts.gpu_store import DeviceStore
from qmix.experts.policy import Policy, PolicySettings
from qmix.experts.residency import Residency
from qmix.files import user_files
from qmix.formats import Checkpoint


class HeatRecord:
    """The policy of a model's experts, with the heat that its last run left.

    The heat file is in the user's cache directory, named by the routers' fingerprint. It is written
    if any token was decoded.

    Args:
        persistent: read the file and write it; otherwise every run starts cold.
    """

    def __init__(
        self, checkpoint: Checkpoint, settings: PolicySettings, *, persistent: bool
    ) -> None:
        config = checkpoint.config
        count = config.num_hidden_layers * config.num_local_experts
        self._path: Path | None = None
        heat = None
        if persistent:
            self._model = fingerprint(checkpoint)
            folder = user_files.cache_directory() / "heat"
            self._path = folder / f"{self._model[:16]}.json"
            heat = heat_file.read_if_good(self._path, experts=count, model=self._model)
        self.policy = Policy(count, settings, heat=heat)

    def save_after(self, store: DiskStore | DeviceStore) -> None:
        """Write the heat file when the store is collected, or when Python exits."""
        if self._path is not None:
            finalize(store, _save, self._path, self._model, store.residency)


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's routers; see heat_file.fingerprint."""
    routers = (tensor for tensor in checkpoint.tensors if tensor.kind == "router")
    names = (name for tensor in routers for name in checkpoint.stored(tensor))
    bits = (checkpoint.read(name).view(torch.uint8).numpy().tobytes() for name in names)
    return heat_file.fingerprint(bits)


def _save(path: Path, model: str, residency: Residency) -> None:
    if not residency.counts.tokens:
        return
    try:
        heat_file.save(path, residency.policy.heat, model=model)
    except WriteError as error:
        warnings.warn(f"{error} The next run starts without it.", stacklevel=2)
