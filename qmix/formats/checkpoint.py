"""A checkpoint directory as a model sees it: config, and each weight by its canonical name.

How a weight is stored is decided from its tensors, never from the config. Knows nothing of modules.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.formats.files.shards import Allocate, Entry, Shards, fresh
from qmix.formats.layouts import awq, bnb, compressed_tensors, gptq, gptq_config
from qmix.formats.metadata import CheckpointMetadata, Packing, read_metadata, wrong_shape
from qmix.formats.names import ModelTensor
from qmix.weights.dense import Dense, Weight


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose tensor set is exactly that of the model.

    Attributes:
        metadata: all that the headers say.
        shards: the files.
    """

    metadata: CheckpointMetadata
    shards: Shards

    @property
    def config(self) -> MixtralConfig:
        return self.metadata.config

    @property
    def tensors(self) -> tuple[ModelTensor, ...]:
        """What the model needs, in walking order."""
        return self.metadata.tensors

    @property
    def stored_names(self) -> Mapping[str, str]:
        """Canonical tensor name -> name in the files."""
        return self.metadata.stored_names

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's floating dtype: the config's, else the embedding's."""
        named = getattr(torch, self.metadata.dtype)
        assert isinstance(named, torch.dtype)
        return named

    def entry(self, name: str) -> Entry:
        return self.shards.entries[self.stored_names[name]]

    def read(self, name: str, into: Allocate = fresh) -> Tensor:
        """One tensor by its canonical name; `into` as for Shards.read."""
        return self.shards.read(self.stored_names[name], into)

    def packed(self, tensor: ModelTensor) -> bool:
        """Whether the weight is stored in 4 or 8 bits."""
        return self.packing(tensor) is not None

    def packing(self, tensor: ModelTensor) -> Packing | None:
        """How the weight is packed, decided from its tensors; None if it is stored as it is."""
        return self.metadata.packing(tensor)

    def module_settings(self, packed: Packing) -> gptq_config.ModuleSettings:
        """What GPTQ's settings say of a weight."""
        return self.metadata.module_settings(packed)

    def weight(self, tensor: ModelTensor, into: Allocate = fresh) -> Weight:
        """The weight of one linear layer, however it is stored.

        Args:
            into: gives memory for the file's tensors where the weight holds them as they are
                stored; what must be transposed is read and built in memory of its own.

        Raises:
            CheckpointError: the stored tensors are damaged, or another shape than the model's.
        """
        packed = self.packing(tensor)
        where = str(self.entry(packed.tensor_names[0] if packed else tensor.name).file)
        if packed:
            weight = self._unpack(packed, tensor, where, into)
        else:
            weight = Dense(self.read(tensor.name, into))
        if weight.shape != tensor.shape:
            raise wrong_shape(where, tensor, weight.shape)
        return weight

    def _unpack(self, packed: Packing, tensor: ModelTensor, where: str, into: Allocate) -> Weight:
        as_stored = packed.layout in ("bitsandbytes", "compressed-tensors")
        read = {name: self.read(name, into if as_stored else fresh) for name in packed.tensor_names}
        prefix, shape = tensor.prefix, (tensor.shape[0], tensor.shape[1])
        match packed.layout:
            case "bitsandbytes":
                return bnb.unpack(read, prefix, where)
            case "compressed-tensors":
                return compressed_tensors.unpack(read, prefix, where, shape)
            case "AWQ":
                return awq.unpack(read, prefix, where, shape)
            case "GPTQ":
                return gptq.unpack(read, prefix, where, shape, self.module_settings(packed))


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a directory and match its tensors against its config, before any data is read.

    Raises:
        CheckpointError: tensors are missing, left over or of a wrong shape; the first five are named.
        UnsupportedError: a layout that is not read, Mistral's own files among them.
    """
    metadata = read_metadata(directory)
    return Checkpoint(metadata, Shards.of(metadata.directory, metadata.tensor_infos))
