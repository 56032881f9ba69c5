"""A checkpoint directory as a model sees it: config, and each weight by its canonical name.

How a weight is stored is decided from its tensors, never from the config. Knows nothing of modules.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError
from qmix.formats.files.shards import Allocate, Entry, Shards, fresh
from qmix.formats.files.spans import Together
from qmix.formats.layouts.packed_tensors import PackedTensors
from qmix.formats.layouts.unpacking import UNPACK, as_stored, on_any_device
from qmix.formats.metadata import CheckpointMetadata, read_metadata
from qmix.formats.names import ModelTensor
from qmix.formats.rotary_rows import half_split
from qmix.formats.tensor_errors import wrong_shape
from qmix.weights.dense import Dense, Weight

_CACHE_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# Changes a weight that is read as numbers: the weight, and its values.
Change = Callable[[ModelTensor, Tensor], Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose tensors are exactly those of the model.

    Attributes:
        metadata: what config and headers say.
        shards: the files.
        change: what `dense` does to each weight.
    """

    metadata: CheckpointMetadata
    shards: Shards
    change: Change | None = field(default=None, kw_only=True)

    @property
    def config(self) -> MixtralConfig:
        return self.metadata.config

    @property
    def tensors(self) -> tuple[ModelTensor, ...]:
        """What the model needs, in the model's order."""
        return self.metadata.tensors

    @property
    def stored_names(self) -> Mapping[str, str]:
        """Canonical tensor name -> name in the files."""
        return self.metadata.stored_names

    @property
    def dtype(self) -> torch.dtype:
        """The checkpoint's floating dtype: the config's, else the embedding's."""
        dtype = getattr(torch, self.metadata.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def entry(self, name: str) -> Entry:
        """Where a tensor lies, by its canonical name."""
        return self.shards.entries[self.stored_names[name]]

    def read(self, name: str, into: Allocate = fresh) -> Tensor:
        """Read a tensor by its canonical name, its rows in Hugging Face's order.

        See shards.read_entry.
        """
        return self._in_order(name, self.read_stored(name, into))

    def _in_order(self, name: str, data: Tensor) -> Tensor:
        heads = self.metadata.tensor_info(name).heads
        return half_split(data, heads) if heads else data

    def read_stored(self, name: str, into: Allocate = fresh) -> Tensor:
        """Read a tensor by its canonical name, as the file has it."""
        return self.shards.read(self.stored_names[name], into)

    def stored(self, tensor: ModelTensor) -> tuple[str, ...]:
        """The canonical names of the tensors that hold a weight."""
        packed = self.packing(tensor)
        return packed.names if packed else (tensor.name,)

    def file_of(self, tensor: ModelTensor) -> Path:
        """The file that holds a weight, or the first of its tensors."""
        return self.entry(self.stored(tensor)[0]).file

    def stored_bytes(self, tensor: ModelTensor) -> int:
        """Bytes in the files of the tensors that hold a weight."""
        return sum(self.entry(name).nbytes for name in self.stored(tensor))

    def packed(self, tensor: ModelTensor) -> bool:
        """Whether the weight is quantized: in 4 or 8 bits, and not in FP8, which is a source."""
        packing = self.packing(tensor)
        return packing is not None and not packing.dense

    def dense(self, tensor: ModelTensor) -> Tensor:
        """A tensor as numbers; in float32 if it is quantized, or stored in FP8.

        Raises:
            CheckpointError: the stored tensors are damaged.
        """
        if self.packing(tensor) is None:
            data = self.read(tensor.name)
        else:
            data = self.weight(tensor).dequantize(torch.float32)
        return data if self.change is None else self.change(tensor, data)

    def dense_dtype(self, tensor: ModelTensor) -> torch.dtype:
        """The dtype of a tensor that is not packed; the checkpoint's if it is."""
        return self.dtype if self.packing(tensor) else self.entry(tensor.name).dtype

    def rounded_dtype(self, tensor: ModelTensor) -> torch.dtype:
        """The dtype of a tensor that stays dense in a 4-bit model, which computes in 16 bits."""
        dtype = self.dense_dtype(tensor)
        if dtype != torch.float32:
            return dtype
        # GGUF's norms are in 32 bits, whatever the rest is in.
        return torch.bfloat16 if self.dtype == torch.float32 else self.dtype

    def dense_bytes(self, tensor: ModelTensor) -> int:
        """Bytes that `dense` takes, with those of the file if the weight is packed."""
        packed = self.packing(tensor)
        if packed is None:
            return self.entry(tensor.name).nbytes
        return sum(info.nbytes for info in packed.infos.values()) + 4 * math.prod(tensor.shape)

    def packing(self, tensor: ModelTensor) -> PackedTensors | None:
        """How the weight is packed, decided from its tensors; None if it is stored as it is."""
        return self.metadata.packing(tensor)

    def weight(self, tensor: ModelTensor, into: Allocate = fresh) -> Weight:
        """The weight of one linear layer, however it is stored.

        Args:
            into: returns memory for the file's tensors if the weight holds them as they are stored;
                what must be transposed is read and built in new memory.

        Raises:
            CheckpointError: the stored tensors are damaged, or have another shape than the model's.
        """
        packed = self.packing(tensor)
        if packed and not as_stored(packed):
            into = fresh
        return self.built(tensor, self.read_all(tensor, into))

    def read_all(self, tensor: ModelTensor, into: Allocate = fresh) -> dict[str, Tensor]:
        """The tensors that hold a weight, by their canonical names; see `read`."""
        return {name: self.read(name, into) for name in self.stored(tensor)}

    def read_together(
        self, names: Iterable[str], into: Allocate, together: Together
    ) -> dict[str, Tensor]:
        """`read` of several tensors, those first that lie together in a file.

        Raises:
            CheckpointError: see `read`.
        """
        entries = {name: self.entry(name) for name in names}
        read = together.read(entries, into)
        return {
            name: self._in_order(name, read[name]) if name in read else self.read(name, into)
            for name in entries
        }

    def built(self, tensor: ModelTensor, tensors: Mapping[str, Tensor]) -> Weight:
        """The weight that `read_all` read, where its tensors lie.

        Raises:
            CheckpointError: as `weight`.
        """
        packed = self.packing(tensor)
        where = str(self.file_of(tensor))
        if packed:
            settings = self.metadata.settings.get(packed.layout)
            weight = UNPACK[packed.layout](tensors, packed, where, settings)
        else:
            weight = Dense(tensors[tensor.name])
        if weight.shape != tensor.shape:
            raise wrong_shape(where, tensor.name, tensor.shape, weight.shape)
        return weight

    def built_anywhere(self, tensor: ModelTensor) -> bool:
        """Whether `built` takes tensors on any device, and not those of the host alone."""
        packed = self.packing(tensor)
        return packed is None or on_any_device(packed)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Open a checkpoint and check its tensors against its config, before any data are read.

    Args:
        directory: a checkpoint's, or a GGUF file, or a folder with one.

    Raises:
        CheckpointError: tensors are missing, left over or of a wrong shape; five are named.
        UnsupportedError: a layout that is not read, such as that of Mistral's own files.
    """
    metadata = read_metadata(directory)
    checkpoint = Checkpoint(metadata, Shards.of(metadata.directory, metadata.tensor_infos))
    for name in metadata.cache_scales:
        _check_cache_scale(checkpoint, name)
    return checkpoint


def _check_cache_scale(checkpoint: Checkpoint, name: str) -> None:
    """Check a scale of a KV cache: one number, or one for each head.

    Raises:
        CheckpointError: it is something else, or not finite and above zero.
    """
    config, entry = checkpoint.config, checkpoint.entry(name)
    counts = (1, config.num_key_value_heads, config.num_attention_heads)
    valid = entry.dtype in _CACHE_SCALE_DTYPES and math.prod(entry.shape) in counts
    found = f"{list(entry.shape)} of {str(entry.dtype).removeprefix('torch.')}"
    if valid:
        values = checkpoint.read(name).float()
        valid = bool(((values > 0) & torch.isfinite(values)).all())
        found = str(values.flatten()[:4].tolist())
    if not valid:
        raise CheckpointError(
            f"tensor {name}: not the scale of a KV cache",
            where=str(entry.file),
            expected="a finite number above 0 in 16 or 32 bits, or one for each head",
            found=found,
        )
