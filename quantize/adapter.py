"""A LoRA beside a checkpoint, merged into each weight as it is read: PEFT's merge in float32.

`adapter_config.json` says how large the update is, `adapter_model.safetensors` holds its factors;
what their names mean is in `adapter_names`. Shape letters: N outputs, K inputs, r the rank, E
experts. Knows no shards and no rounding.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from qmix import strict_json
from qmix.errors import CheckpointError, UnsupportedError
from qmix.files import regular_file
from qmix.formats import Checkpoint
from qmix.formats.files.shards import Entry, check_finite, read_entries, read_entry
from qmix.formats.layouts.name_matcher import NameMatcher
from qmix.formats.names import ModelTensor
from qmix.quantize.adapter_names import Factors, updates

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_CHUNK_BYTES = 16 << 20
# Starts from which PEFT's merge is W + scaling * B A; the others change the weights beneath too.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")
# Settings that make another update than that, each with the values that leave it so.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("lora_bias", "use_qalora", "use_bdlora"), (None, False)),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"), (None,)
    ),
    **dict.fromkeys(("monteclora_config", "velora_config"), (None,)),
    "trainable_token_indices": (None, [], {}),
    "bias": (None, "none"),
}


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA, which changes a checkpoint's weights.

    Attributes:
        updates: what it holds for each weight, by the weight's canonical name.
        digest: SHA-256 of its weights and its config.
    """

    folder: Path
    config: Mapping[str, Any]
    entries: Mapping[str, Entry]
    updates: Mapping[str, Factors]
    digest: str
    _alphas: tuple[NameMatcher, tuple[float, ...]]
    _kept: dict[str, Tensor] = field(default_factory=dict)

    def changes(self, name: str) -> bool:
        """Whether it changes the weight of this canonical name."""
        return name in self.updates

    def __call__(self, tensor: ModelTensor, data: Tensor) -> Tensor:
        """A weight after the merge, in float32; the weight itself if it is not changed.

        Raises:
            CheckpointError: a factor holds NaN or infinity.
        """
        factors = self.updates.get(tensor.name)
        if factors is None:
            return data
        weight = self._read(factors.whole) if factors.whole else data.float()
        if factors.a is None or factors.b is None:
            return weight
        a, b = factors.slices(self._read(factors.a), self._read(factors.b))
        scaling = self._scaling(factors)
        if factors.transposed:
            delta = (a.T @ b.T if factors.expert is not None else (b @ a).T) * scaling
        else:
            delta = (b @ a) * scaling
        if factors.magnitude is None:
            return weight + delta
        length: Tensor = torch.linalg.norm(weight + delta, dim=1)
        factor: Tensor = self._read(factors.magnitude).reshape(-1) / length
        return factor[:, None] * (weight + delta)

    def _scaling(self, factors: Factors) -> float:
        matcher, alphas = self._alphas
        found = next(
            (index for name in factors.keys if (index := matcher.first(name)) is not None), None
        )
        alpha = self.config.get("lora_alpha", 8) if found is None else alphas[found]
        rank = math.sqrt(factors.rank) if self.config.get("use_rslora") else factors.rank
        return float(alpha) / rank

    def _read(self, name: str) -> Tensor:
        """A tensor in float32; the last four are kept, as the experts of a layer may share them."""
        if name not in self._kept:
            entry = self.entries[name]
            data = read_entry(name, entry)
            check_finite(name, entry.file, data)
            while len(self._kept) >= 4:
                self._kept.pop(next(iter(self._kept)))
            self._kept[name] = data.float()
        return self._kept[name]

    def check_unchanged(self) -> None:
        """Raise if a file is not what it was when it was opened.

        Raises:
            CheckpointError: it is another one now.
        """
        if _digest(self.folder) != self.digest:
            raise CheckpointError(
                "the adapter changed while it was merged",
                where=str(self.folder),
                remedy="Run again once nothing writes to it.",
            )


AnyCheckpoint = TypeVar("AnyCheckpoint", bound=Checkpoint)


def with_adapter(checkpoint: AnyCheckpoint, folder: Path) -> AnyCheckpoint:
    """The checkpoint, whose weights are merged with a LoRA's as they are read as numbers."""
    return replace(checkpoint, change=open_adapter(folder, checkpoint))


def adapter_of(checkpoint: Checkpoint) -> Adapter | None:
    """The LoRA that a checkpoint is merged with."""
    return checkpoint.change if isinstance(checkpoint.change, Adapter) else None


def facts_of(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """What a manifest and a run's state say of the LoRA; nothing if there is none."""
    adapter = adapter_of(checkpoint)
    if adapter is None:
        return {}
    return {"adapter": {"name": adapter.folder.resolve().name, "sha256": adapter.digest}}


def check_adapter(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError if the LoRA's files changed since they were opened."""
    adapter = adapter_of(checkpoint)
    if adapter is not None:
        adapter.check_unchanged()


def bytes_in_memory(checkpoint: Checkpoint, tensor: ModelTensor) -> int:
    """Bytes that a weight takes while it is read as numbers, and merged in float32."""
    adapter, read = adapter_of(checkpoint), checkpoint.dense_bytes(tensor)
    merged = 3 * 4 * math.prod(tensor.shape)  # the weight, the update and their sum
    return read + merged if adapter is not None and adapter.changes(tensor.name) else read


def open_adapter(folder: Path, checkpoint: Checkpoint) -> Adapter:
    """Open a folder that PEFT wrote, and check that it fits the checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or its tensors are not of this model.
        UnsupportedError: another kind of adapter than a LoRA that can be merged.
    """
    folder = regular_file.checked_folder(folder)
    if not regular_file.exists(folder / CONFIG):
        raise CheckpointError(
            "no adapter",
            where=str(folder),
            expected=f"{CONFIG} and {WEIGHTS}, as PEFT saves them",
            found="neither" if not regular_file.exists(folder / WEIGHTS) else WEIGHTS,
        )
    config = strict_json.read(folder / CONFIG)
    _check(config, folder / CONFIG)
    if not regular_file.exists(folder / WEIGHTS):
        pickled = regular_file.exists(folder / "adapter_model.bin")
        raise CheckpointError(
            "the adapter has no weights",
            where=str(folder),
            expected=WEIGHTS,
            found="adapter_model.bin, which is a pickle" if pickled else "none",
            remedy="Load it with PEFT and save it with safe_serialization=True."
            if pickled
            else None,
        )
    entries = read_entries(folder / WEIGHTS)
    shapes = {name: entry.shape for name, entry in entries.items()}
    found = updates(shapes, checkpoint, folder / WEIGHTS, transposed=_is_old(config))
    return Adapter(folder, config, entries, found, _digest(folder), _alphas(config, folder))


def _check(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(
            "not a LoRA", where=f"{path}: peft_type", expected="'LORA'", found=repr(kind)[:80]
        )
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise UnsupportedError(
                "such a LoRA is not merged",
                where=f"{path}: {name}",
                expected=f"{neutral[-1]!r}",
                found=repr(config[name])[:80],
                remedy="Merge it with PEFT (merge_and_unload), and quantize the result.",
            )
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise UnsupportedError(
            "a LoRA that started by changing the weights beneath it",
            where=f"{path}: init_lora_weights",
            found=repr(start)[:80],
            remedy="Save it with PEFT's path_initial_model_for_weight_conversion.",
        )
    for name, valid in (("lora_alpha", _is_number), ("alpha_pattern", _is_alphas)):
        if config.get(name) is not None and not valid(config[name]):
            raise CheckpointError(
                "wrong type",
                where=f"{path}: {name}",
                expected="a number" if name == "lora_alpha" else "numbers by module",
                found=repr(config[name])[:80],
            )


def _is_old(config: Mapping[str, Any]) -> bool:
    """Whether PEFT before 0.19 wrote it, which took stacked experts for transposed; see
    adapter_names. Before 0.18 it did not say its version.
    """
    version = re.match(r"(\d{1,4})\.(\d{1,4})", str(config.get("peft_version") or "0.0"))
    return version is not None and (int(version[1]), int(version[2])) < (0, 19)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_alphas(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_number, value.values()))


def _alphas(config: Mapping[str, Any], folder: Path) -> tuple[NameMatcher, tuple[float, ...]]:
    """The modules whose alpha is not the usual one, as PEFT matches their names, and the alphas."""
    patterns = config.get("alpha_pattern") or {}
    expressions = tuple(
        (key, rf"{key[1:]}$" if key.startswith("^") else rf"(.*\.)?({key})$") for key in patterns
    )
    where = f"{folder / CONFIG}: alpha_pattern"
    return NameMatcher(expressions, where), tuple(map(float, patterns.values()))


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with regular_file.open_regular(folder / name) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
