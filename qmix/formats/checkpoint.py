"""A checkpoint directory as a model sees it: config, and each weight by its canonical name.

How a weight is stored is decided from its tensors, never from the config. Knows nothing of modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats import awq, bnb, compressed, gptq, gptq_config, mistral, names
from qmix.formats.names import ModelTensor
from qmix.formats.shards import Entry, Shards, open_shards
from qmix.weights import Dense, Weight

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Marks of layouts that are not read, so that they are refused by name.
_FOREIGN = {
    ".SCB": "bitsandbytes LLM.int8",
    ".W_q": "HQQ",
    ".trellis": "EXL3",
    ".q_weight": "EXL2",
    ".gate_up_proj": "fused experts",
}

Layout = Literal["bitsandbytes", "compressed-tensors", "AWQ", "GPTQ"]


@dataclass(frozen=True)
class Packed:
    """How one weight is packed, and the canonical names of its tensors.

    Those that the layout demands are among them even if the files lack them.
    """

    layout: Layout
    members: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose tensor set is exactly that of the model.

    Attributes:
        config: of config.json.
        shards: the files.
        tensors: what the model needs, in walking order.
        spelled: canonical tensor name -> name in the files.
        settings: what GPTQ's tensors do not say by themselves.
    """

    config: MixtralConfig
    shards: Shards
    tensors: tuple[ModelTensor, ...]
    spelled: Mapping[str, str]
    settings: gptq_config.Settings = field(default_factory=gptq_config.Settings)

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's floating dtype: the config's, else the embedding's."""
        if self.config.dtype is not None:
            named = getattr(torch, self.config.dtype)
            assert isinstance(named, torch.dtype)
            return named
        return self.entry("model.embed_tokens.weight").dtype

    def entry(self, name: str) -> Entry:
        return self.shards.entries[self.spelled[name]]

    def read(self, name: str) -> Tensor:
        """One tensor by its canonical name."""
        return self.shards.read(self.spelled[name])

    def packed(self, tensor: ModelTensor) -> bool:
        """Whether the weight is stored in 4 or 8 bits."""
        return self.packing(tensor) is not None

    def packing(self, tensor: ModelTensor) -> Packed | None:
        """How the weight is packed, decided from its tensors; None if it is stored as it is."""
        prefix, spelled = tensor.prefix, self.spelled
        if not tensor.linear:
            return None
        if members := bnb.members(prefix, spelled):
            return Packed("bitsandbytes", tuple(dict.fromkeys((tensor.name, *members))))
        if members := compressed.members(prefix, spelled):
            return Packed("compressed-tensors", members)
        members = awq.members(prefix, spelled)
        if members and self.entry(members[0]).shape[:1] == tensor.shape[1:]:
            return Packed("AWQ", members)
        if members := gptq.members(prefix, spelled):
            return Packed("GPTQ", members)
        return None

    def declared(self, packed: Packed) -> gptq_config.Declared:
        """What GPTQ's settings say of a weight."""
        return self.settings.of(self.spelled[packed.members[0]].rpartition(".")[0])

    def weight(self, tensor: ModelTensor) -> Weight:
        """The weight of one linear layer, however it is stored.

        Raises:
            CheckpointError: the stored tensors are damaged, or another shape than the model's.
        """
        packed = self.packing(tensor)
        where = str(self.entry(packed.members[0] if packed else tensor.name).file)
        weight = self._unpack(packed, tensor, where) if packed else Dense(self.read(tensor.name))
        if weight.shape != tensor.shape:
            raise _wrong_shape(where, tensor, weight.shape)
        return weight

    def _unpack(self, packed: Packed, tensor: ModelTensor, where: str) -> Weight:
        read = {name: self.read(name) for name in packed.members}
        prefix, shape = tensor.prefix, (tensor.shape[0], tensor.shape[1])
        match packed.layout:
            case "bitsandbytes":
                return bnb.unpack(read, prefix, where)
            case "compressed-tensors":
                return compressed.unpack(read, prefix, where, shape)
            case "AWQ":
                return awq.unpack(read, prefix, where, shape)
            case "GPTQ":
                return gptq.unpack(read, prefix, where, shape, self.declared(packed))


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a directory and match its tensors against its config, before any data is read.

    Raises:
        CheckpointError: tensors are missing, left over or of a wrong shape; the first five are named.
        UnsupportedError: a layout that is not read, Mistral's own files among them.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(
            "no such directory",
            where=str(folder),
            remedy="Give the folder that holds config.json and the safetensors files.",
        )
    mistral.refuse_raw(folder)
    config = MixtralConfig.from_pretrained(folder)
    shards = open_shards(folder)
    spelled: dict[str, str] = {}
    for name in shards.entries:
        if names.ignored(name):
            continue
        canonical = names.canonical(name)
        if canonical in spelled:
            raise CheckpointError(
                "the same tensor under two names",
                where=str(shards.entries[name].file),
                found=f"{spelled[canonical]} and {name}",
            )
        spelled[canonical] = name
    if names.count(config) > len(shards.entries) + 1000:  # absurd sizes are not spelled out
        raise CheckpointError(
            "not the tensors of the model that config.json describes",
            where=str(folder),
            expected=f"at least {names.count(config)} tensors",
            found=len(shards.entries),
            remedy="The download is incomplete, or config.json is another model's.",
        )
    tensors = tuple(names.model_tensors(config))
    if config.tie_word_embeddings:
        spelled.pop("lm_head.weight", None)  # a saved copy of the embedding
    _refuse_foreign(folder, spelled)
    checkpoint = Checkpoint(config, shards, tensors, spelled)
    checkpoint = replace(checkpoint, settings=_settings(checkpoint))
    _match(checkpoint)
    return checkpoint


def _settings(checkpoint: Checkpoint) -> gptq_config.Settings:
    """Check what the config says of the layouts that the tensors have."""
    packings = (checkpoint.packing(tensor) for tensor in checkpoint.tensors)
    layouts = {packed.layout for packed in packings if packed}
    config = checkpoint.config.quantization_config
    method = config.get("quant_method") if config else None
    if "compressed-tensors" in layouts:
        compressed.check(*settings_of(checkpoint, None))
    # AWQ's other versions may look like GPTQ without g_idx; the config tells them by name.
    if "AWQ" in layouts or ("GPTQ" in layouts and method == "awq"):
        awq.check(*settings_of(checkpoint, awq.FILE))
    if "GPTQ" in layouts:
        return gptq_config.settings(*settings_of(checkpoint, gptq_config.FILE))
    return gptq_config.Settings()


def settings_of(checkpoint: Checkpoint, beside: str | None) -> tuple[Mapping[str, Any] | None, str]:
    """The quantization settings and their file: config.json's, else those of the file `beside` it."""
    folder = checkpoint.shards.directory
    if checkpoint.config.quantization_config is not None:
        return checkpoint.config.quantization_config, str(folder / "config.json")
    if beside is not None and (folder / beside).exists():
        return strict_json.read(folder / beside), str(folder / beside)
    return None, str(folder)


def _refuse_foreign(folder: Path, spelled: Mapping[str, str]) -> None:
    for name in spelled:
        for suffix, layout in _FOREIGN.items():
            if name.endswith(suffix):
                raise UnsupportedError(
                    f"{layout} checkpoints are not read",
                    where=str(folder),
                    expected="16-bit, or 4-bit of bitsandbytes, GPTQ, AWQ or compressed-tensors",
                    found=spelled[name],
                    remedy="Quantize the 16-bit checkpoint with qmix quantize.",
                )


def _match(checkpoint: Checkpoint) -> None:
    """Every tensor used exactly once, none missing, none left over."""
    folder, spelled = checkpoint.shards.directory, checkpoint.spelled
    left = set(spelled)
    missing: list[str] = []
    for tensor in checkpoint.tensors:
        packed = checkpoint.packing(tensor)
        needed = packed.members if packed else (tensor.name,)
        missing += [name for name in needed if name not in left]
        left -= set(needed)
        if packed or tensor.name not in spelled:
            continue
        entry = checkpoint.entry(tensor.name)
        if entry.shape != tensor.shape:
            raise _wrong_shape(str(entry.file), tensor, entry.shape)
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {tensor.name}: wrong dtype",
                where=str(entry.file),
                expected="F32, F16 or BF16",
                found=str(entry.dtype).removeprefix("torch."),
            )
    if missing or left:
        named = [f"missing {n}" for n in missing[:5]] + [f"left over {n}" for n in sorted(left)[:5]]
        config = checkpoint.config
        raise CheckpointError(
            f"not the tensors of a Mixtral with {config.num_hidden_layers} layers and "
            f"{config.num_local_experts} experts: {len(missing)} missing, {len(left)} left over",
            where=str(folder if missing else checkpoint.entry(min(left)).file),
            expected="each tensor of config.json's model once",
            found="; ".join(named[:5]),
            remedy="The download is incomplete, or config.json is another model's.",
        )


def _wrong_shape(where: str, tensor: ModelTensor, found: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"tensor {tensor.name}: wrong shape",
        where=where,
        expected=list(tensor.shape),
        found=list(found),
        remedy="config.json and the files do not belong together.",
    )
