"""A checkpoint's metadata: config, each weight by its canonical name, and how it is stored.

How a weight is stored is decided from its tensors' names and shapes, never from the config. Knows
no torch: reading the metadata takes milliseconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError
from qmix.files import regular_file
from qmix.formats import names
from qmix.formats.files.safetensors_header import DTYPES, TensorInfo
from qmix.formats.files.shard_index import read_headers
from qmix.formats.layouts import (
    awq_config,
    bnb_config,
    compressed_config,
    gptq_config,
    tensor_names,
)
from qmix.formats.layouts.settings import PackedModule, Settings
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.mistral import detect
from qmix.formats.names import ModelTensor
from qmix.formats.tensor_errors import check_count, wrong_shape, wrong_tensors
from qmix.weights.scheme import GROUP_SIZES, NF4_BLOCK_SIZES, Kind, Scheme

_FLOATS = ("F32", "F16", "BF16")

# Name endings of layouts that are not read, so that the error can name the layout.
_UNREAD_LAYOUTS = {
    ".SCB": "bitsandbytes LLM.int8",
    ".W_q": "HQQ",
    ".trellis": "EXL3",
    ".q_weight": "EXL2",
    ".gate_up_proj": "fused experts",
}


@dataclass(frozen=True)
class Packing:
    """How one weight is packed, and the canonical names of its tensors.

    Names that the layout requires are among them even if the files lack them.
    """

    layout: Layout
    tensor_names: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointMetadata:
    """What the config and the headers of a checkpoint say; its tensors are exactly the model's.

    Attributes:
        tensor_infos: of the files, by the names in the files.
        tensors: what the model needs, in the model's order.
        stored_names: canonical tensor name -> name in the files.
        gptq: what GPTQ's tensors do not say by themselves.
        awq, compressed: the settings of these layouts; None if no weight has them.
    """

    directory: Path
    config: MixtralConfig
    tensor_infos: Mapping[str, TensorInfo]
    tensors: tuple[ModelTensor, ...]
    stored_names: Mapping[str, str]
    gptq: gptq_config.GPTQConfig = field(default_factory=gptq_config.GPTQConfig)
    awq: Settings | None = None
    compressed: compressed_config.CompressedConfig | None = None

    @property
    def zero_point(self) -> bool:
        """Whether the zeros of AWQ's weights may differ from half of the range."""
        return self.awq is None or self.awq.flag("zero_point") is not False

    @property
    def dtype(self) -> str:
        """The checkpoint's floating dtype by torch's name: the config's, else the embedding's."""
        if self.config.dtype is not None:
            return self.config.dtype
        return DTYPES[self.tensor_info("model.embed_tokens.weight").dtype][0]

    def tensor_info(self, name: str) -> TensorInfo:
        """The header's entry of a tensor, by its canonical name."""
        return self.tensor_infos[self.stored_names[name]]

    def module_name(self, name: str) -> str:
        """The module of a tensor as the files name it, by the tensor's canonical name."""
        return self.stored_names[name].rpartition(".")[0]

    def packing(self, tensor: ModelTensor) -> Packing | None:
        """How the weight is packed, decided from its tensors; None if it is dense."""
        prefix, present = tensor.prefix, self.stored_names
        if not tensor.linear:
            return None
        if weight_names := tensor_names.bnb_names(prefix, present):
            return Packing("bitsandbytes", tuple(dict.fromkeys((tensor.name, *weight_names))))
        if weight_names := tensor_names.compressed_names(prefix, present):
            return Packing("compressed-tensors", weight_names)
        weight_names = tensor_names.awq_names(prefix, present)
        if weight_names and self.tensor_info(weight_names[0]).shape[:1] == tensor.shape[1:]:
            return Packing("AWQ", weight_names)
        if weight_names := tensor_names.gptq_names(prefix, present):
            return Packing("GPTQ", weight_names)
        return None

    def module_settings(self, packing: Packing) -> gptq_config.ModuleSettings:
        """What GPTQ's settings say of a weight."""
        return self.gptq.for_module(self.module_name(packing.tensor_names[0]))

    def scheme_of(self, tensor: ModelTensor, packing: Packing) -> Scheme:
        """The scheme of a packed weight, as far as shapes and settings tell.

        An AWQ weight counts as asymmetric, although all its zeros may be 8.
        """
        shapes = self._shapes(packing)
        return self._scheme(tensor, packing, shapes, self._groups(packing, shapes))

    def _scheme(
        self,
        tensor: ModelTensor,
        packing: Packing,
        shapes: Mapping[str, tuple[int, ...]],
        groups: int,
    ) -> Scheme:
        """See `scheme_of`; `shapes` and `groups` are those of `_shapes` and `_groups`."""
        if packing.layout == "bitsandbytes":
            return _bnb_scheme(shapes, groups, math.prod(tensor.shape))
        columns = tensor.shape[1]
        bits: int | None = 4
        if packing.layout == "compressed-tensors":
            symmetric = "weight_zero_point" not in shapes
            bits = tensor_names.compressed_bits(math.prod(shapes["weight_packed"][-1:]), columns)
        else:
            symmetric = packing.layout == "GPTQ" and self.module_settings(packing).symmetric
            if packing.layout == "GPTQ":
                bits = tensor_names.gptq_bits(math.prod(shapes["qweight"][:1]), columns)
        size = columns // max(groups, 1)
        return Scheme(
            kind="int8" if bits == 8 else "int4",
            group_size=size if size in GROUP_SIZES else -1,
            symmetric=symmetric,
        )

    def packed_module(self, tensor: ModelTensor, packing: Packing) -> PackedModule | None:
        """What the headers say of a packed weight; None if its scales have no shape to speak of."""
        shapes = self._shapes(packing)
        groups = self._groups(packing, shapes)
        if groups < 1:
            return None
        name = self.module_name(packing.tensor_names[0])
        return PackedModule(
            name=name,
            names=_all_names(name, tensor),
            scheme=self._scheme(tensor, packing, shapes, groups),
            shape=(tensor.shape[0], tensor.shape[1]),
            groups=groups,
            has_g_idx="weight_g_idx" in shapes,
        )

    def _shapes(self, packing: Packing) -> dict[str, tuple[int, ...]]:
        """The shapes of a weight's tensors, by the last part of their names."""
        infos = {name: self.tensor_info(name) for name in packing.tensor_names}
        return {name.rpartition(".")[2]: info.shape for name, info in infos.items()}

    @staticmethod
    def _groups(packing: Packing, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Scales of an output, or blocks of bitsandbytes' whole weight; 0 if there is no shape."""
        if packing.layout == "bitsandbytes":
            return math.prod(shapes.get("absmax", (0,)))
        if packing.layout == "compressed-tensors":
            return math.prod(shapes["weight_scale"][-1:] or (0,))
        return math.prod(shapes["scales"][:1] or (0,))

    def quantization_settings(
        self, settings_file: str | None
    ) -> tuple[Mapping[str, Any] | None, str]:
        """The quantization settings, or None, and the file or directory for errors.

        Args:
            settings_file: the file beside config.json that is read if config.json has none.
        """
        if self.config.quantization_config is not None:
            return self.config.quantization_config, str(self.directory / "config.json")
        if settings_file is not None and (self.directory / settings_file).exists():
            path = self.directory / settings_file
            return strict_json.read(path), str(path)
        return None, str(self.directory)


def _all_names(module: str, tensor: ModelTensor) -> tuple[str, ...]:
    """A module's name in the files, then its other spellings."""
    return tuple(dict.fromkeys((module, *names.spellings(tensor.prefix))))


def _bnb_scheme(shapes: Mapping[str, tuple[int, ...]], blocks: int, count: int) -> Scheme:
    """The scheme of `count` weights in `blocks` from the shapes of bitsandbytes' tensors."""
    # Sizes that give the same number of blocks differ in the last block only.
    fitting = [size for size in NF4_BLOCK_SIZES if -(-count // size) == blocks]
    block_size = 64 if 64 in fitting or not fitting else fitting[0]
    kind: Kind = "fp4" if "bitsandbytes__fp4" in shapes else "nf4"
    return Scheme(kind=kind, block_size=block_size, double_quant="nested_absmax" in shapes)


def read_metadata(directory: str | Path) -> CheckpointMetadata:
    """Read config and headers, and check that the tensors are those of the config's model.

    Raises:
        CheckpointError: tensors are missing, left over or of a wrong shape; five are named.
        UnsupportedError: a layout that is not read, such as that of Mistral's own files.
    """
    folder = regular_file.checked_folder(directory)
    detect.refuse_raw(folder)
    config = MixtralConfig.from_pretrained(folder)
    infos = read_headers(folder)
    stored_names = _stored_names(infos)
    check_count(str(folder), names.count(config), len(infos), description="config.json")
    tensors = tuple(names.model_tensors(config))
    if config.tie_word_embeddings:
        stored_names.pop("lm_head.weight", None)  # a saved copy of the embedding
    _refuse_unread_layouts(folder, stored_names)
    metadata = CheckpointMetadata(folder, config, infos, tensors, stored_names)
    metadata = _with_settings(metadata)
    _check_tensors(metadata)
    _confirm_settings(metadata)
    return metadata


def _stored_names(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Canonical tensor name -> name in the files."""
    stored_names: dict[str, str] = {}
    for name, info in infos.items():
        if names.ignored(name):
            continue
        canonical = names.canonical(name)
        if canonical in stored_names:
            raise CheckpointError(
                "the same tensor under two names",
                where=str(info.file),
                found=f"{stored_names[canonical]} and {name}",
            )
        stored_names[canonical] = name
    return stored_names


def _with_settings(metadata: CheckpointMetadata) -> CheckpointMetadata:
    """Read the quantization settings of the layouts that the tensors have."""
    packings = (metadata.packing(tensor) for tensor in metadata.tensors)
    layouts = {packing.layout for packing in packings if packing}
    config = metadata.config.quantization_config
    method = config.get("quant_method") if config else None
    if "compressed-tensors" in layouts:
        settings = compressed_config.read(*metadata.quantization_settings(None))
        metadata = replace(metadata, compressed=settings)
    # AWQ's other versions may look like GPTQ without g_idx; the config tells them by name.
    if "AWQ" in layouts or ("GPTQ" in layouts and method == "awq"):
        awq = awq_config.read(*metadata.quantization_settings(awq_config.FILE))
        metadata = replace(metadata, awq=awq)
    if "GPTQ" in layouts:
        gptq = gptq_config.parse(*metadata.quantization_settings(gptq_config.FILE))
        metadata = replace(metadata, gptq=gptq)
    return metadata


def _confirm_settings(metadata: CheckpointMetadata) -> None:
    """Refuse settings that the tensors contradict, by field."""
    modules: dict[Layout, list[PackedModule]] = {}
    dense: list[tuple[str, ...]] = []
    for tensor in metadata.tensors:
        packing = metadata.packing(tensor)
        if packing and (module := metadata.packed_module(tensor, packing)):
            modules.setdefault(packing.layout, []).append(module)
        elif not packing and tensor.linear and tensor.kind != "router":
            dense.append(_all_names(metadata.module_name(tensor.name), tensor))
    if bnb := modules.get("bitsandbytes"):
        bnb_config.check(*metadata.quantization_settings(None), bnb)
    if metadata.compressed:
        metadata.compressed.confirm(modules.get("compressed-tensors", []), dense)
    if metadata.awq:
        awq_config.confirm(metadata.awq, modules.get("AWQ", []))
    if gptq := modules.get("GPTQ"):
        gptq_config.confirm(metadata.gptq, gptq)


def _refuse_unread_layouts(folder: Path, stored_names: Mapping[str, str]) -> None:
    for name in stored_names:
        for suffix, layout in _UNREAD_LAYOUTS.items():
            if name.endswith(suffix):
                raise UnsupportedError(
                    f"{layout} checkpoints are not read",
                    where=str(folder),
                    expected="16-bit, or 4-bit of bitsandbytes, GPTQ, AWQ or compressed-tensors",
                    found=stored_names[name],
                    remedy="Quantize the 16-bit checkpoint with qmix quantize.",
                )


def _check_tensors(metadata: CheckpointMetadata) -> None:
    """Raise unless every tensor is used exactly once, and none is missing."""
    folder, stored_names = metadata.directory, metadata.stored_names
    left_over = set(stored_names)
    missing: list[str] = []
    for tensor in metadata.tensors:
        packing = metadata.packing(tensor)
        needed = packing.tensor_names if packing else (tensor.name,)
        missing += [name for name in needed if name not in left_over]
        left_over -= set(needed)
        if packing or tensor.name not in stored_names:
            continue
        info = metadata.tensor_info(tensor.name)
        if info.shape != tensor.shape:
            raise wrong_shape(str(info.file), tensor.name, tensor.shape, info.shape)
        if info.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {tensor.name}: wrong dtype",
                where=str(info.file),
                expected="F32, F16 or BF16",
                found=DTYPES[info.dtype][0],
            )
    if missing or left_over:
        where = folder if missing else metadata.tensor_info(min(left_over)).file
        raise wrong_tensors(
            str(where),
            metadata.config,
            missing,
            sorted(left_over),
            description="config.json",
        )
