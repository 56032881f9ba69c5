"""The bytes of a model by its parts: in host memory as files have it, on a GPU in the packed layout.

From headers, or from a config and an assumed scheme. Mirrors what the loader and the placement do, so
that a plan is what will be measured. Knows no torch and no tensors. Shape letters: N outputs, K
inputs, D hidden width, F expert width, E experts, L layers.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from qmix.config import MixtralConfig
from qmix.errors import UnsupportedError
from qmix.formats.files.safetensors_header import DTYPES
from qmix.formats.metadata import CheckpointMetadata
from qmix.formats.names import ModelTensor, TensorKind, model_tensors
from qmix.weights.packed.tile_format import BYTE_ROWS, PANEL, TileFormat, tile_format
from qmix.weights.scheme import DENSE, NESTED_BLOCK, Recipe, Scheme

PAGE_BYTES = 4096  # blobs of experts start on pages
_LINE_BYTES = 64  # and their tensors on cache lines
ITEM_BYTES = dict(DTYPES.values())
_TABLE_BYTES = 16 * 4  # the values of NF4's codes
_MAP_BYTES = 256 * 4  # the values of nested scales' codes
_STATE_BYTES = 170  # bitsandbytes' description of one weight, as JSON; half without nested scales


@dataclass(frozen=True)
class StoredWeight:
    """One weight as files hold it.

    Attributes:
        stored: bytes in the files.
        members: bytes of each of its tensors there.
        item: bytes an element of what is not codes: the dense weight, or integers' scales.
        scattered: its inputs may be scattered over their groups (act-order).
    """

    tensor: ModelTensor
    scheme: Scheme
    members: tuple[int, ...]
    item: int
    scattered: bool = False

    @property
    def stored(self) -> int:
        return sum(self.members)

    @property
    def count(self) -> int:
        return math.prod(self.tensor.shape)

    @property
    def group(self) -> int:
        """Consecutive inputs of a row that share a scale."""
        if not self.scheme.integer:
            return self.scheme.block_size
        return self.tensor.shape[1] if self.scheme.group_size == -1 else self.scheme.group_size

    @property
    def codes(self) -> int:
        """Bytes of the codes."""
        return -(-self.count * self.scheme.bits // 8)

    def held(self, item: int) -> int:
        """Bytes in memory, in the standard layout; dense weights of `item` bytes an element."""
        if self.scheme.kind == "dense":
            return self.count * item
        return self.codes + self.scales

    @property
    def scales(self) -> int:
        """Bytes in memory besides the codes: scales, zeros, tables, order of inputs."""
        if self.scheme.integer:
            rows, columns = self.tensor.shape
            zeros = 0 if self.scheme.symmetric else 1
            order = 4 * columns if self.scattered else 0
            return rows * (columns // self.group) * (self.item + zeros) + order
        blocks = -(-self.count // self.scheme.block_size)
        if not self.scheme.double_quant:
            return 4 * blocks + _TABLE_BYTES
        return blocks + 4 * -(-blocks // NESTED_BLOCK) + _MAP_BYTES + _TABLE_BYTES

    def blob(self, item: int) -> int:
        """Bytes that an arena keeps for it, at most: its tensors as stored, each on a line of its own."""
        if self.scheme.kind == "dense":
            return _aligned(self.count * item, _LINE_BYTES)
        total = sum(_aligned(size, _LINE_BYTES) for size in self.members)
        if self.scheme.integer:  # zeros become a byte each, and an order is kept as int32
            rows, columns = self.tensor.shape
            total += _aligned(rows * (columns // self.group), _LINE_BYTES)
            total += _aligned(4 * columns, _LINE_BYTES)
        return total


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """What a plan asks of a model: its shape, and how each weight is stored.

    Attributes:
        dtype: of activations and dense weights, by torch's name.
        weights: in walking order.
        assumed: the scheme that was assumed; None if files say it.
    """

    name: str
    config: MixtralConfig
    dtype: str
    weights: tuple[StoredWeight, ...]
    assumed: Scheme | None = None

    @classmethod
    def of(cls, metadata: CheckpointMetadata, dtype: str | None = None) -> "StoredModel":
        """As the files hold it.

        Args:
            dtype: of activations and dense weights; default: the checkpoint's.
        """
        quantization = metadata.config.quantization_config or {}
        scattered = bool(quantization.get("desc_act")) or (
            quantization.get("quant_method") == "gptq" and "desc_act" not in quantization
        )
        weights = []
        for tensor in metadata.tensors:
            packed = metadata.packing(tensor)
            if packed is None:
                header = metadata.tensor_info(tensor.name)
                item = DTYPES[header.dtype][1]
                weights.append(StoredWeight(tensor, DENSE, (header.nbytes,), item))
                continue
            headers = {name: metadata.tensor_info(name) for name in packed.tensor_names}
            scale = next((h for n, h in headers.items() if n.endswith(("scales", "scale"))), None)
            weights.append(
                StoredWeight(
                    tensor,
                    metadata.scheme_of(tensor, packed),
                    tuple(header.nbytes for header in headers.values()),
                    DTYPES[scale.dtype][1] if scale else 4,
                    scattered and packed.layout == "GPTQ",
                )
            )
        return cls(
            name=metadata.directory.resolve().name,
            config=metadata.config,
            dtype=dtype or metadata.dtype,
            weights=tuple(weights),
        )

    @classmethod
    def assume(
        cls, name: str, config: MixtralConfig, scheme: Scheme, *, attention: bool = True
    ) -> "StoredModel":
        """As `qmix quantize` would store it."""
        recipe, dtype = Recipe.uniform(scheme, attention=attention), config.dtype or "bfloat16"
        if dtype == "float32":
            dtype = "bfloat16"  # 16 bits are what a 4-bit model computes in
        weights = []
        for tensor in model_tensors(config):
            one = StoredWeight(tensor, recipe.scheme_of(tensor.name), (), 2)
            weights.append(replace(one, members=_members(one)))
        return cls(name=name, config=config, dtype=dtype, weights=tuple(weights), assumed=scheme)

    @property
    def dense(self) -> bool:
        """Whether nothing is quantized."""
        return all(weight.scheme == DENSE for weight in self.weights)

    @property
    def stored(self) -> int:
        """Bytes of the weights' files."""
        return sum(weight.stored for weight in self.weights)

    @property
    def experts(self) -> int:
        """L * E."""
        return self.config.num_hidden_layers * self.config.num_local_experts

    @cached_property
    def on_device(self) -> "Footprint":
        """See `on_device`."""
        return on_device(self)

    @cached_property
    def on_host(self) -> "Footprint":
        """See `on_host`."""
        return on_host(self)

    @cached_property
    def loading(self) -> int:
        """Bytes of the largest weight on its way, if it is not kept as its file has it: integers are
        turned, dense weights brought into `dtype`."""
        item = ITEM_BYTES[self.dtype]
        other = [w.stored for w in self.weights if w.scheme.kind == "dense" and w.item != item]
        turned = [3 * w.stored for w in self.weights if w.scheme.integer]
        return max((*other, *turned, 0))

    @cached_property
    def first_layer(self) -> int:
        """Bytes of one layer in memory, in the standard layout."""
        item = ITEM_BYTES[self.dtype]
        return sum(weight.held(item) for weight in self.weights if weight.tensor.layer == 0)

    @cached_property
    def largest(self) -> int:
        """Bytes of the largest weight in the files."""
        return max(weight.stored for weight in self.weights)

    def kv_bytes(self, context: int, batch: int = 1) -> int:
        """Keys and values of `context` positions in each of `batch` rows; a rolling cache holds W."""
        config = self.config
        held = min(context, config.sliding_window or context)
        width = 2 * config.num_key_value_heads * config.head_dim
        return batch * held * width * config.num_hidden_layers * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's parts where it runs.

    Attributes:
        experts: of each, by layer * E + expert.
        blob: what an arena keeps for each of them, whole pages.
        kinds: bytes of the other weights by kind.
        kept: bytes that stay on the host beside a model on a GPU: the scales as they were read.
        unpacked: why experts have no packed layout; None if they have, and without a GPU.
    """

    experts: tuple[int, ...]
    blob: int
    kinds: Mapping[TensorKind, int]
    kept: int = 0
    unpacked: str | None = None

    @cached_property
    def whole(self) -> int:
        """Of all experts."""
        return sum(self.experts)

    @property
    def total(self) -> int:
        """Of all weights."""
        return self.whole + sum(self.kinds.values())

    @cached_property
    def reads(self) -> int:
        """Bytes of other weights that every token reads; of the embedding it is one row."""
        return sum(size for kind, size in self.kinds.items() if kind != "embedding")


def on_host(model: StoredModel) -> Footprint:
    """In host memory, in the standard layouts."""
    item = ITEM_BYTES[model.dtype]
    kinds: dict[TensorKind, int] = defaultdict(int)
    for weight in model.weights:
        if weight.tensor.kind != "expert":
            kinds[weight.tensor.kind] += weight.held(item)
    groups = _experts(model)
    return Footprint(
        tuple(sum(weight.held(item) for weight in group) for group in groups),
        _aligned(max(sum(w.blob(item) for w in group) for group in groups), PAGE_BYTES),
        _shared_head(model, kinds),
    )


def on_device(model: StoredModel) -> Footprint:
    """On a GPU, quantized weights in the packed layout where they have one."""
    item, kept = ITEM_BYTES[model.dtype], 0
    kinds: dict[TensorKind, int] = defaultdict(int)
    attention: dict[int | None, list[StoredWeight]] = defaultdict(list)
    for weight in model.weights:
        if weight.tensor.kind == "attention":
            attention[weight.tensor.layer].append(weight)
        elif weight.tensor.kind != "expert":
            kinds[weight.tensor.kind] += _matrix(weight, item)
            kept += _left(weight)
    for q, k, v, o in attention.values():
        joined = _joined((q, k, v))
        apart = (o,) if joined is not None else (q, k, v, o)
        kinds["attention"] += (joined or 0) + sum(_matrix(weight, item) for weight in apart)
        kept += sum(_left(weight) for weight in apart)
        kept += 0 if joined is None else sum(weight.scales for weight in (q, k, v))
    groups, reason = _experts(model), _refused(model)
    sizes = [0] * len(groups)
    for layer in range(model.config.num_hidden_layers):
        ids = range(
            layer * model.config.num_local_experts, (layer + 1) * model.config.num_local_experts
        )
        formats = [_expert_formats(groups[index]) for index in ids]
        alike = reason is None and formats[0] is not None and len(set(formats)) == 1
        for index in ids:
            if alike:
                sizes[index] = _packed_expert(groups[index])
                kept += sum(weight.scales for weight in groups[index])
            else:  # one by one, each matrix in the packed layout if it has one
                sizes[index] = sum(_matrix(weight, item) for weight in groups[index])
                kept += sum(_left(weight) for weight in groups[index])
        if not alike and reason is None:
            reason = "experts of a layer that are stored differently, or in a shape without a packed layout"
    return Footprint(
        tuple(sizes),
        _aligned(max(sizes), PAGE_BYTES),
        _shared_head(model, kinds),
        kept,
        reason,
    )


def _shared_head(model: StoredModel, kinds: dict[TensorKind, int]) -> dict[TensorKind, int]:
    """A tied head reads the whole embedding, which lies there once."""
    if model.config.tie_word_embeddings:
        kinds["head"] = kinds.pop("embedding")
    return dict(kinds)


def _experts(model: StoredModel) -> list[tuple[StoredWeight, ...]]:
    """w1, w2, w3 of each, by layer * E + expert."""
    found = [weight for weight in model.weights if weight.tensor.kind == "expert"]
    return [tuple(found[index : index + 3]) for index in range(0, len(found), 3)]


def _aligned(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to


def _format(weight: StoredWeight, rows: int = PANEL) -> TileFormat | None:
    """The tile format; None if it has no packed layout."""
    kind: Literal["nf4", "int4"]
    match weight.scheme.kind:
        case "nf4":
            kind, symmetric = "nf4", True
        case "int4":
            kind, symmetric = "int4", weight.scheme.symmetric
        case _:
            return None
    shape = (weight.tensor.shape[0], weight.tensor.shape[1])
    try:
        return tile_format(kind, shape, group=weight.group, symmetric=symmetric, rows=rows)
    except UnsupportedError:
        return None


def _matrix(weight: StoredWeight, item: int) -> int:
    """Bytes of a matrix of its own on a GPU."""
    plan = _format(weight) if weight.tensor.linear else None
    if plan is None:
        return weight.held(item)
    return plan.matrix_bytes((weight.tensor.shape[0], weight.tensor.shape[1]))


def _left(weight: StoredWeight) -> int:
    """Bytes that stay on the host of a matrix in the packed layout."""
    packed = weight.tensor.linear and _format(weight) is not None
    return weight.scales if packed else 0


def _joined(parts: Sequence[StoredWeight]) -> int | None:
    """Bytes of q, k and v as one matrix; None if they are not stored alike, or it has no packed layout."""
    first = parts[0]
    if len({(weight.scheme, weight.item) for weight in parts}) != 1:
        return None
    if not first.scheme.integer and any(weight.count % weight.group for weight in parts):
        return None
    shape = (sum(weight.tensor.shape[0] for weight in parts), first.tensor.shape[1])
    plan = _format(replace(first, tensor=replace(first.tensor, shape=shape)))
    return None if plan is None else plan.matrix_bytes(shape)


def _expert_formats(parts: Sequence[StoredWeight]) -> tuple[TileFormat, TileFormat] | None:
    """Of w1 with w3, and of w2; None if they have no packed layout."""
    w1, w2, w3 = parts
    gate, up, down = _format(w1, BYTE_ROWS), _format(w3, BYTE_ROWS), _format(w2)
    if gate is None or down is None or gate != up or w1.group != w3.group:
        return None
    return gate, down


def _packed_expert(parts: Sequence[StoredWeight]) -> int:
    formats = _expert_formats(parts)
    assert formats is not None
    width, hidden = parts[0].tensor.shape
    return formats[0].matrix_bytes((2 * width, hidden)) + formats[1].matrix_bytes((hidden, width))


def _refused(model: StoredModel) -> str | None:
    """What the kernels ask of a model as a whole."""
    if model.config.hidden_act not in ("silu", "swish"):
        return "the kernels fuse SiLU only"
    if model.config.num_local_experts & (model.config.num_local_experts - 1):
        return "the kernels count experts by powers of two"
    return None


def _members(weight: StoredWeight) -> tuple[int, ...]:
    """The files' tensors of a weight that `qmix quantize` would write."""
    scheme = weight.scheme
    if scheme.kind == "dense":
        return (weight.count * weight.item,)
    if not scheme.integer:
        blocks = -(-weight.count // scheme.block_size)
        if not scheme.double_quant:
            return (weight.codes, 4 * blocks, _TABLE_BYTES, _STATE_BYTES // 2)
        nested = (blocks, 4 * -(-blocks // NESTED_BLOCK), _MAP_BYTES, _TABLE_BYTES, _STATE_BYTES)
        return (weight.codes, *nested)
    rows, columns = weight.tensor.shape
    groups = columns // weight.group
    zeros = -(-rows * groups * scheme.bits // 8)
    return (weight.codes, rows * groups * weight.item, zeros, 4 * columns)
