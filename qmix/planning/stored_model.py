"""A model as its files store it, weight by weight: from their headers, or assumed from a config.

Counts bytes in the files and in the standard layouts of host memory. Knows no torch, no tensors and
no GPU.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from qmix.config import MixtralConfig
from qmix.formats.files.safetensors_header import DTYPES
from qmix.formats.layouts.gptq_config import GPTQConfig
from qmix.formats.layouts.packed_tensors import PackedTensors
from qmix.formats.metadata import CheckpointMetadata
from qmix.formats.names import ModelTensor, model_tensors
from qmix.hub.local import shown_name
from qmix.kv_format import KVFormat, row_bytes
from qmix.weights.blob import blob_bytes, quantized_bytes
from qmix.weights.packed.packed_shapes import MatrixSpec
from qmix.weights.scheme import DENSE, GGUF_TABLES, NESTED_BLOCK, Recipe, Scheme

ITEM_BYTES = dict(DTYPES.values())
_TABLE_BYTES = 16 * 4  # the values of a table weight's codes
_MAP_BYTES = 256 * 4  # the values of nested scales' codes
_STATE_BYTES = 170  # bitsandbytes' description of one weight, as JSON; half without nested scales


@dataclass(frozen=True)
class StoredWeight:
    """One weight as files store it.

    Attributes:
        tensor_bytes: bytes of each of its tensors in the files.
        item: bytes of one element of a dense weight (1 in FP8), or of one scale of integers.
        scattered: its inputs may be scattered over their groups (act-order).
    """

    tensor: ModelTensor
    scheme: Scheme
    tensor_bytes: tuple[int, ...]
    item: int
    scattered: bool = False

    @property
    def file_bytes(self) -> int:
        return sum(self.tensor_bytes)

    @property
    def elements(self) -> int:
        return math.prod(self.tensor.shape)

    @property
    def group(self) -> int:
        """Consecutive inputs of a row that share a scale."""
        if not self.scheme.integer:
            return self.scheme.block_size
        return self.tensor.shape[1] if self.scheme.group_size == -1 else self.scheme.group_size

    @property
    def code_bytes(self) -> int:
        return -(-self.elements * self.scheme.bits // 8)

    def nbytes(self, item: int) -> int:
        """`Weight.nbytes` once it is loaded: codes, scales, zeros, biases, the order of inputs.

        Args:
            item: bytes of an element of a dense weight in memory.
        """
        if self.scheme.kind == "dense":
            return self.elements * item
        return self.scheme.nbytes(self.tensor.shape, scale_bytes=self.item) + self._order_bytes

    @property
    def scale_bytes(self) -> int:
        """Bytes in memory besides the codes: scales, zeros, tables, the order of the inputs."""
        return self.memory_bytes(self.item) - self.code_bytes

    def memory_bytes(self, item: int) -> int:
        """Bytes in memory in the standard layout, tables included; `item` as in `nbytes`."""
        return self.nbytes(item) + self._table_bytes

    def blob_bytes(self, item: int) -> int:
        """The most bytes that an arena keeps for the weight; `item` as in `nbytes`."""
        if self.scheme.kind == "dense":
            return blob_bytes((self.elements * item,))
        return quantized_bytes(self.scheme, self.tensor.shape, self.tensor_bytes)

    @property
    def spec(self) -> MatrixSpec:
        """What decides how a GPU's packed layout holds the weight."""
        rows, columns = self.tensor.shape
        scheme = self.scheme
        symmetric = scheme.symmetric if scheme.integer else True
        return MatrixSpec(scheme.kind, (rows, columns), self.group, symmetric)

    @property
    def _order_bytes(self) -> int:
        """Bytes of the order of scattered inputs."""
        return 4 * self.tensor.shape[1] if self.scattered else 0

    @property
    def _table_bytes(self) -> int:
        """Bytes of the tables that the weight has for itself: of its codes, and of nested scales'.

        Those of affine weights, and the maps of GGUF's scales, are constants that all share.
        """
        scheme = self.scheme
        if scheme.kind == "dense" or scheme.integer:
            return 0
        nested = 0 if scheme.kind in GGUF_TABLES else _MAP_BYTES
        return _TABLE_BYTES + (nested if scheme.double_quant else 0)


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What a plan has to know of a model: its shape, and how each weight is stored.

    Attributes:
        dtype: of activations and dense weights, by torch's name.
        weights: in the order of the model's modules.
        assumed: the scheme, if it was assumed; None if files say it.
        rounding: bytes that the largest weight takes while it is rounded on its way into memory.
        kv: how caches keep keys and values.
    """

    name: str
    config: MixtralConfig
    dtype: str
    weights: tuple[StoredWeight, ...]
    assumed: Scheme | None = None
    rounding: int = 0
    kv: KVFormat = "16"

    @classmethod
    def of(cls, metadata: CheckpointMetadata, dtype: str | None = None) -> "StoredModel":
        """The model of a checkpoint's headers.

        Args:
            dtype: of activations and dense weights; default: the checkpoint's.
        """
        return cls(
            name=shown_name(metadata.directory),
            config=metadata.config,
            dtype=dtype or metadata.dtype,
            weights=tuple(_stored(metadata, tensor) for tensor in metadata.tensors),
        )

    @classmethod
    def assume(
        cls,
        name: str,
        config: MixtralConfig,
        scheme: Scheme,
        *,
        attention: bool = True,
        recipe: Recipe | None = None,
    ) -> "StoredModel":
        """The model as `qmix quantize` would store it.

        Args:
            recipe: where not every weight is stored in `scheme`; that is the typical one then.
        """
        recipe = recipe or Recipe.uniform(scheme, attention=attention)
        dtype = config.dtype or "bfloat16"
        if dtype == "float32":
            dtype = "bfloat16"  # a 4-bit model computes in 16 bits
        weights = []
        for tensor in model_tensors(config):
            weight = StoredWeight(tensor, recipe.scheme_of(tensor.name), (), 2)
            weights.append(replace(weight, tensor_bytes=_assumed_bytes(weight)))
        found = {weight.scheme for weight in weights} - {DENSE}
        assumed = found.pop() if len(found) == 1 else scheme
        return cls(name=name, config=config, dtype=dtype, weights=tuple(weights), assumed=assumed)

    @classmethod
    def rounded(cls, metadata: CheckpointMetadata, recipe: Recipe, dtype: str) -> "StoredModel":
        """The model of dense files, each weight of which is rounded while it is loaded."""
        stored = cls.of(metadata, dtype)
        weights, rounding = [], 0
        for weight in stored.weights:
            scheme = recipe.scheme_of(weight.tensor.name)
            if scheme.kind != "dense":
                in_float32 = 4 * weight.elements if weight.item == 1 else 0  # FP8
                rounding = max(rounding, weight.file_bytes + in_float32)
                rounded = StoredWeight(weight.tensor, scheme, (), 2)
                weight = replace(rounded, tensor_bytes=_assumed_bytes(rounded))
            weights.append(weight)
        return replace(stored, weights=tuple(weights), rounding=rounding)

    @property
    def dense(self) -> bool:
        """Whether nothing is quantized."""
        return all(weight.scheme == DENSE for weight in self.weights)

    @property
    def mixed(self) -> bool:
        """Whether its weights are quantized in several schemes."""
        return len({weight.scheme for weight in self.weights} - {DENSE}) > 1

    @property
    def assumption(self) -> str | None:
        """What was assumed of its quantized weights, in words; None if files say it."""
        if self.assumed is None or not self.mixed:
            return None if self.assumed is None else str(self.assumed)
        return f"integers of {self.bits_per_weight:.3g} bits on average"

    @property
    def bits_per_weight(self) -> float:
        """Bits of a quantized weight, on average, scales included."""
        quantized = [weight for weight in self.weights if weight.scheme != DENSE]
        bits = sum(weight.scheme.bits_per_weight * weight.elements for weight in quantized)
        return bits / sum(weight.elements for weight in quantized)

    @property
    def file_bytes(self) -> int:
        """Bytes of all weights in the files."""
        return sum(weight.file_bytes for weight in self.weights)

    @property
    def experts(self) -> int:
        """The number of experts in all layers."""
        return self.config.num_hidden_layers * self.config.num_local_experts

    @property
    def item(self) -> int:
        """Bytes of one element of `dtype`."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def expert_weights(self) -> tuple[tuple[StoredWeight, ...], ...]:
        """w1, w2 and w3 of each expert, by layer * E + expert."""
        experts = [weight for weight in self.weights if weight.tensor.kind == "expert"]
        return tuple(tuple(experts[index : index + 3]) for index in range(0, len(experts), 3))

    @cached_property
    def loading(self) -> int:
        """Bytes that the largest weight takes while it is converted: integers are transposed, they
        and the tables of GGUF are reordered, and dense weights are brought into `dtype`. 0 if no
        weight is converted.
        """
        converted = [
            3 * weight.file_bytes
            for weight in self.weights
            if weight.scheme.integer or weight.scheme.kind in GGUF_TABLES
        ]
        converted += [
            # FP8 is dequantized in float32 first.
            weight.file_bytes + (4 * weight.elements if weight.item == 1 else 0)
            for weight in self.weights
            if weight.scheme.kind == "dense" and weight.item != self.item
        ]
        return max((*converted, self.rounding))

    @cached_property
    def first_layer(self) -> int:
        """Bytes of layer 0 in memory, in the standard layout."""
        layer = [weight for weight in self.weights if weight.tensor.layer == 0]
        return sum(weight.memory_bytes(self.item) for weight in layer)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest weight in the files."""
        return max(weight.file_bytes for weight in self.weights)

    def kv_bytes(self, context: int, batch: int = 1) -> int:
        """Keys and values of `context` positions in each of `batch` rows; a sliding window bounds
        the positions.
        """
        config = self.config
        positions = min(context, config.sliding_window or context)
        rows = 2 * config.num_key_value_heads * config.num_hidden_layers
        return batch * positions * rows * row_bytes(self.kv, config.head_dim, self.item)


def _stored(metadata: CheckpointMetadata, tensor: ModelTensor) -> StoredWeight:
    """A weight from the headers of its tensors."""
    packing = metadata.packing(tensor)
    if packing is None:
        info = metadata.tensor_info(tensor.name)
        return StoredWeight(tensor, DENSE, (info.nbytes,), DTYPES[info.dtype][1])
    infos = {name: metadata.tensor_info(name) for name in packing.names}
    return StoredWeight(
        tensor,
        metadata.scheme_of(packing),
        tuple(info.nbytes for info in infos.values()),
        1 if packing.dense else _scale_item(packing),
        packing.layout == "GPTQ" and _scattered(metadata, packing.module),
    )


def _scale_item(packing: PackedTensors) -> int:
    """Bytes of a plain scale: float16 inside GGUF's blocks, float32 in bitsandbytes' layout."""
    if packing.layout == "GGUF":
        return ITEM_BYTES["float16"]
    scales = (info for name, info in packing.infos.items() if name.endswith(("scales", "scale")))
    scale = next(scales, None)
    return DTYPES[scale.dtype][1] if scale else ITEM_BYTES["float32"]


def _scattered(metadata: CheckpointMetadata, module: str) -> bool:
    """Whether the inputs of a module of GPTQ may be scattered: unless the settings deny it."""
    settings: GPTQConfig = metadata.settings["GPTQ"]
    return settings.for_module(module).act_order is not False


def _assumed_bytes(weight: StoredWeight) -> tuple[int, ...]:
    """Bytes of each tensor that `qmix quantize` would write for a weight."""
    scheme = weight.scheme
    if scheme.kind == "dense":
        return (weight.elements * weight.item,)
    if not scheme.integer:
        blocks = -(-weight.elements // scheme.block_size)
        if not scheme.double_quant:
            return (weight.code_bytes, 4 * blocks, _TABLE_BYTES, _STATE_BYTES // 2)
        nested = (blocks, 4 * -(-blocks // NESTED_BLOCK), _MAP_BYTES, _TABLE_BYTES, _STATE_BYTES)
        return (weight.code_bytes, *nested)
    rows, columns = weight.tensor.shape
    groups = columns // weight.group
    zeros = -(-rows * groups * scheme.bits // 8)
    return (weight.code_bytes, rows * groups * weight.item, zeros, 4 * columns)
