"""A checkpoint's metadata: config, each weight by its canonical name, and how it is stored.

How a weight is stored is decided from its tensors' names and shapes, never from the config. Knows
no torch: reading the metadata takes milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError
from qmix.files import regular_file
from qmix.formats import names, unread_layouts
from qmix.formats.files.safetensors_header import DTYPES, TensorInfo
from qmix.formats.files.shard_index import read_headers
from qmix.formats.gguf.config import read_config
from qmix.formats.gguf.tensors import DESCRIPTION, check_shapes, named_tensors
from qmix.formats.layouts.headers import LAYOUT_OF, LAYOUTS, LayoutHeaders
from qmix.formats.layouts.packed_tensors import PackedTensors
from qmix.formats.layouts.settings import PackedModule
from qmix.formats.layouts.tensor_names import ACTIVATION_SCALES, Layout
from qmix.formats.mistral import detect
from qmix.formats.names import ModelTensor
from qmix.formats.stacked import unstacked
from qmix.formats.tensor_errors import check_count, wrong_shape, wrong_tensors
from qmix.gguf.files import is_gguf, read_model
from qmix.weights.scheme import Scheme

Container = Literal["safetensors", "GGUF"]

# Where each format describes the model, for errors.
_DESCRIPTIONS: Mapping[Container, str] = {"safetensors": "config.json", "GGUF": DESCRIPTION}
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class CheckpointMetadata:
    """What the config and the headers of a checkpoint say; its tensors are exactly the model's.

    Attributes:
        tensor_infos: of the files, by the names in the files; stacked experts are taken apart.
        tensors: what the model needs, in the model's order.
        stored_names: canonical tensor name -> name in the files.
        settings: of the layouts that the weights have, each as its row in layouts.headers reads it.
        container: the format of the files.
    """

    directory: Path
    config: MixtralConfig
    tensor_infos: Mapping[str, TensorInfo]
    tensors: tuple[ModelTensor, ...]
    stored_names: Mapping[str, str]
    settings: Mapping[Layout, Any] = field(default_factory=dict)
    container: Container = "safetensors"

    @property
    def dtype(self) -> str:
        """The checkpoint's floating dtype by torch's name.

        It is the config's, else the embedding's, or the last norm's if that is packed.
        """
        if self.config.dtype is not None:
            return self.config.dtype
        embedding = self.tensor_info("model.embed_tokens.weight").dtype
        if embedding not in _FLOATS:  # it is packed
            embedding = self.tensor_info("model.norm.weight").dtype
        return DTYPES[embedding][0]

    def tensor_info(self, name: str) -> TensorInfo:
        """The header's entry of a tensor, by its canonical name."""
        return self.tensor_infos[self.stored_names[name]]

    def module_name(self, name: str) -> str:
        """The module of a tensor as the files name it, by the tensor's canonical name."""
        return self.stored_names[name].rpartition(".")[0]

    @cached_property
    def _infos(self) -> Mapping[str, TensorInfo]:
        """The header's entries by canonical name."""
        return {name: self.tensor_infos[stored] for name, stored in self.stored_names.items()}

    @cached_property
    def _packings(self) -> Mapping[str, PackedTensors]:
        """The packed weights, by the weight's canonical name."""
        found = ((tensor.name, self._packing(tensor)) for tensor in self.tensors)
        return {name: packed for name, packed in found if packed is not None}

    def packing(self, tensor: ModelTensor) -> PackedTensors | None:
        """How the weight is packed, decided from its tensors; None if it is dense."""
        return self._packings.get(tensor.name)

    def _packing(self, tensor: ModelTensor) -> PackedTensors | None:
        for layout in LAYOUTS:
            if tensor.kind not in layout.kinds:
                continue
            if found := layout.find(tensor, self._infos):
                start = len(tensor.prefix) + 1
                present = [name for name in found if name in self._infos]
                optional = self._optional(layout)
                kept = tuple(
                    name for name in found if name in present or name[start - 1 :] not in optional
                )
                return PackedTensors(
                    layout=layout.name,
                    tensor=tensor,
                    module=self.stored_names[present[0]].removesuffix(present[0][start - 1 :]),
                    names=kept,
                    infos={name[start:]: self._infos[name] for name in present},
                )
        return None

    def _optional(self, layout: LayoutHeaders) -> frozenset[str]:
        """What the files may lack of a layout's tensors, once its settings are read."""
        settings = self.settings.get(layout.name)
        return frozenset() if settings is None else layout.optional(settings)

    def scheme_of(self, packed: PackedTensors) -> Scheme:
        """The scheme of a packed weight, as far as headers and settings tell."""
        return LAYOUT_OF[packed.layout].scheme(packed, self.settings.get(packed.layout))

    @cached_property
    def cache_scales(self) -> tuple[str, ...]:
        """The scales of a rounded KV cache, which no weight needs, by canonical name."""
        return tuple(name for name in self.stored_names if names.of_cache(name, self.config))

    @cached_property
    def activation_scales(self) -> tuple[str, ...]:
        """The scales of rounded activations, which belong to packed weights, by canonical name."""
        return tuple(
            name
            for packed in self._packings.values()
            for name in packed.names
            if name.endswith(ACTIVATION_SCALES)
        )

    def packed_module(self, packed: PackedTensors) -> PackedModule | None:
        """What the headers say of a packed weight; None if its scales have no shape to speak of."""
        groups = LAYOUT_OF[packed.layout].groups(packed)
        if groups < 1:
            return None
        return PackedModule(
            name=packed.module,
            names=_all_names(packed.module, packed.tensor),
            scheme=self.scheme_of(packed),
            shape=packed.matrix,
            groups=groups,
            has_g_idx="weight_g_idx" in packed.infos,
            scale_shape=packed.scale_shape,
        )

    def quantization_settings(
        self, settings_file: str | None, field: str | None = None
    ) -> tuple[Mapping[str, Any] | None, str]:
        """The quantization settings, or None, and the file or directory for errors.

        Args:
            settings_file: the file beside config.json that is read if config.json has none.
            field: of config.json, which comes before `quantization_config`.

        Raises:
            CheckpointError: the field is no object, or contradicts `quantization_config`.
        """
        own = None if field is None else self.config.extra.get(field)
        if own is not None:
            where = f"{self.directory / 'config.json'}: {field}"
            same = self.config.quantization_config in (None, own)
            if not same or not isinstance(own, Mapping):
                raise CheckpointError(
                    "wrong type" if same else "contradicts quantization_config",
                    where=where,
                    expected="an object" if same else "equal settings in both fields",
                    found=repr(own)[:80],
                )
            return own, where
        if self.config.quantization_config is not None:
            return self.config.quantization_config, str(self.directory / "config.json")
        if settings_file is not None and (self.directory / settings_file).exists():
            path = self.directory / settings_file
            return strict_json.read(path), str(path)
        return None, str(self.directory)


def _all_names(module: str, tensor: ModelTensor) -> tuple[str, ...]:
    """A module's name in the files, then its other spellings."""
    return tuple(dict.fromkeys((module, *names.spellings(tensor.prefix))))


def read_metadata(directory: str | Path) -> CheckpointMetadata:
    """Read config and headers, and check that the tensors are those of the config's model.

    Args:
        directory: a checkpoint's, or a GGUF file, or a folder with one.

    Raises:
        CheckpointError: tensors are missing, left over or of a wrong shape; five are named.
        UnsupportedError: a layout that is not read, such as that of Mistral's own files.
    """
    if is_gguf(directory):
        return _read_gguf(Path(directory))
    folder = regular_file.checked_folder(directory)
    detect.refuse_raw(folder)
    unread_layouts.refuse_files(folder)
    config = MixtralConfig.from_pretrained(folder)
    infos = unstacked(read_headers(folder), config)
    stored_names = _stored_names(infos)
    check_count(str(folder), names.count(config), len(infos), description="config.json")
    tensors = tuple(names.model_tensors(config))
    if config.tie_word_embeddings:
        stored_names.pop("lm_head.weight", None)  # a saved copy of the embedding
    unread_layouts.refuse(folder, stored_names, config.quantization_config)
    metadata = CheckpointMetadata(folder, config, infos, tensors, stored_names)
    metadata = _with_settings(metadata)
    _check_tensors(metadata)
    _confirm_settings(metadata)
    return metadata


def _read_gguf(path: Path) -> CheckpointMetadata:
    model = read_model(path)
    config = read_config(model)
    named = named_tensors(model, config)
    needed, found = names.count(config), len(named.infos)
    check_count(str(path), needed, found, description=DESCRIPTION)
    tensors = tuple(names.model_tensors(config))
    check_shapes(named, tensors)
    metadata = CheckpointMetadata(
        path, config, named.infos, tensors, named.stored_names, container="GGUF"
    )
    _check_tensors(metadata)
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
    found = {packed.layout for packed in map(metadata.packing, metadata.tensors) if packed}
    settings = {
        layout.name: layout.read(*metadata.quantization_settings(layout.file, layout.field))
        for layout in LAYOUTS
        if layout.name in found
    }
    return replace(metadata, settings=settings)


def _confirm_settings(metadata: CheckpointMetadata) -> None:
    """Refuse settings that the tensors contradict, by field."""
    modules: dict[Layout, list[PackedModule]] = {}
    dense: list[tuple[str, ...]] = []
    for tensor in metadata.tensors:
        packed = metadata.packing(tensor)
        if packed and (module := metadata.packed_module(packed)):
            modules.setdefault(packed.layout, []).append(module)
        elif not packed and tensor.linear and tensor.kind != "router":
            dense.append(_all_names(metadata.module_name(tensor.name), tensor))
    for name, settings in metadata.settings.items():
        LAYOUT_OF[name].confirm(settings, modules.get(name, []), dense)


def _check_tensors(metadata: CheckpointMetadata) -> None:
    """Raise unless every tensor is used exactly once, and none is missing."""
    folder, stored_names = metadata.directory, metadata.stored_names
    description = _DESCRIPTIONS[metadata.container]
    left_over = set(stored_names) - set(metadata.cache_scales)
    missing: list[str] = []
    for tensor in metadata.tensors:
        packed = metadata.packing(tensor)
        needed = packed.names if packed else (tensor.name,)
        missing += [name for name in needed if name not in left_over]
        left_over -= set(needed)
        if packed or tensor.name not in stored_names:
            continue
        info = metadata.tensor_info(tensor.name)
        if info.shape != tensor.shape:
            raise wrong_shape(
                str(info.file), tensor.name, tensor.shape, info.shape, description=description
            )
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
            description=description,
        )
