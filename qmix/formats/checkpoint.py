"""A checkpoint directory as a model sees it: config, and each weight by its canonical name.

How a weight is stored is decided from its tensors, never from the config. Knows nothing of modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats import bnb, names
from qmix.formats.names import ModelTensor
from qmix.formats.shards import Entry, Shards, open_shards
from qmix.weights import Dense, Weight

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Marks of layouts that are not read, so that they are refused by name.
_FOREIGN = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes LLM.int8",
    ".W_q": "HQQ",
    ".trellis": "EXL3",
    ".q_weight": "EXL2",
    ".gate_up_proj": "fused experts",
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose tensor set is exactly that of the model.

    Attributes:
        config: of config.json.
        shards: the files.
        tensors: what the model needs, in walking order.
        spelled: canonical tensor name -> name in the files.
    """

    config: MixtralConfig
    shards: Shards
    tensors: tuple[ModelTensor, ...]
    spelled: Mapping[str, str]

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
        """Whether the weight is stored in 4 bits."""
        return bool(bnb.members(tensor.prefix, self.spelled.keys()))

    def weight(self, tensor: ModelTensor) -> Weight:
        """The weight of one linear layer, however it is stored.

        Raises:
            CheckpointError: the stored tensors are damaged, or another shape than the model's.
        """
        where = str(self.entry(tensor.name).file)
        if self.packed(tensor):
            members = bnb.members(tensor.prefix, self.spelled.keys())
            weight: Weight = bnb.unpack(
                {name: self.read(name) for name in members}, tensor.prefix, where
            )
        else:
            weight = Dense(self.read(tensor.name))
        if weight.shape != tensor.shape:
            raise _wrong_shape(where, tensor, weight.shape)
        return weight


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a directory and match its tensors against its config, before any data is read.

    Raises:
        CheckpointError: tensors are missing, left over or of a wrong shape; the first five are named.
        UnsupportedError: a layout that is not read.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(
            "no such directory",
            where=str(folder),
            remedy="Give the folder that holds config.json and the safetensors files.",
        )
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
    tensors = tuple(names.model_tensors(config))
    if config.tie_word_embeddings:
        spelled.pop("lm_head.weight", None)  # a saved copy of the embedding
    checkpoint = Checkpoint(config, shards, tensors, spelled)
    _refuse_foreign(folder, spelled)
    _match(checkpoint)
    return checkpoint


def _refuse_foreign(folder: Path, spelled: Mapping[str, str]) -> None:
    for name in spelled:
        for suffix, layout in _FOREIGN.items():
            if name.endswith(suffix):
                raise UnsupportedError(
                    f"{layout} checkpoints are not read",
                    where=str(folder),
                    expected="16-bit or bitsandbytes 4-bit safetensors",
                    found=spelled[name],
                    remedy="Quantize the 16-bit checkpoint with qmix quantize.",
                )


def _match(checkpoint: Checkpoint) -> None:
    """Every tensor used exactly once, none missing, none left over."""
    folder, spelled = checkpoint.shards.directory, checkpoint.spelled
    left = set(spelled)
    missing: list[str] = []
    for tensor in checkpoint.tensors:
        if tensor.name not in left:
            missing.append(tensor.name)
            continue
        members = bnb.members(tensor.prefix, spelled.keys()) if tensor.linear else ()
        left -= {tensor.name, *members}
        if members:
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
            where=str(folder),
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
