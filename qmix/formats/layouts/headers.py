"""What headers and settings say of packed weights: a row for each layout, asked in this order.

How a weight is stored is decided from its tensors' names and shapes, never from the settings. What
the bits mean is said where the tensors are read (layouts.unpacking). Knows no torch.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmix.formats.files.safetensors_header import DTYPES, TensorInfo
from qmix.formats.layouts import (
    auto_round_config,
    awq_config,
    bnb_config,
    compressed_config,
    fp8_config,
    gguf_schemes,
    gptq_config,
    hqq_config,
    mlx_config,
    modelopt_config,
    tensor_names,
)
from qmix.formats.layouts.packed_tensors import PackedTensors
from qmix.formats.layouts.settings import PackedModule, Settings
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.names import ModelTensor, TensorKind
from qmix.weights.scheme import DENSE, GROUP_SIZES, NF4_BLOCK_SIZES, Kind, Scheme

_FP8_SCALES = frozenset(("weight_scale", "weight_scale_inv"))
_LINEAR: frozenset[TensorKind] = frozenset(("attention", "router", "expert", "head"))


@dataclass(frozen=True, kw_only=True)
class LayoutHeaders:
    """How the headers of one layout are read.

    Attributes:
        name: of the layout.
        kinds: of the weights that it packs.
        file: where its settings stand if config.json has none; None if nowhere.
        field: of config.json, where they stand before `quantization_config`; None if nowhere.
        find: (the weight, the header's entries by canonical name) -> the names of its tensors, none
            if it has another layout.
        read: (the settings, the file for errors) -> the settings, checked by themselves.
        scheme: the scheme, as far as headers and settings tell.
        groups: scales of an output, or blocks of the whole weight; 0 if there is no shape.
        confirm: checks the settings against the packed modules and the names of the dense ones.
        optional: what follows a module's name in those of tensors that files with these settings
            may lack, although `find` gives them.
    """

    name: Layout
    kinds: frozenset[TensorKind] = _LINEAR
    file: str | None = None
    field: str | None = None
    find: Callable[[ModelTensor, Mapping[str, TensorInfo]], tuple[str, ...]]
    read: Callable[[Mapping[str, Any] | None, str], Any]
    scheme: Callable[[PackedTensors, Any], Scheme]
    groups: Callable[[PackedTensors], int]
    confirm: Callable[[Any, Collection[PackedModule], Collection[Sequence[str]]], None]
    optional: Callable[[Any], frozenset[str]] = lambda _: frozenset()


def _find_bnb(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    found = tensor_names.bnb_names(tensor.prefix, infos)
    return tuple(dict.fromkeys((tensor.name, *found))) if found else ()


def _bnb_blocks(packed: PackedTensors) -> int:
    return math.prod(packed.shape("weight.absmax") or (0,))


def _bnb_scheme(packed: PackedTensors, _: Any) -> Scheme:
    blocks, count = _bnb_blocks(packed), math.prod(packed.tensor.shape)
    # Sizes that give the same number of blocks differ in the last block only.
    fitting = [size for size in NF4_BLOCK_SIZES if -(-count // size) == blocks]
    block_size = 64 if 64 in fitting or not fitting else fitting[0]
    kind: Kind = "fp4" if "weight.quant_state.bitsandbytes__fp4" in packed.infos else "nf4"
    nested = "weight.nested_absmax" in packed.infos
    return Scheme(kind=kind, block_size=block_size, double_quant=nested)


def _find_modelopt(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    dtype = _dtype(tensor.prefix + tensor_names.WEIGHT, infos)
    scaled = dtype == "U8" and tensor.prefix + tensor_names.SCALE in infos
    if not scaled and tensor.prefix + tensor_names.SCALE_2 not in infos:
        return ()
    return tensor_names.modelopt_names(tensor.prefix, infos)


def _find_fp8(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    dtype = _dtype(tensor.prefix + tensor_names.WEIGHT, infos)
    if dtype != "F8_E4M3" and tensor.prefix + tensor_names.SCALE_INV not in infos:
        return ()
    return tensor_names.fp8_names(tensor.prefix, infos)


def _find_compressed(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    prefix = tensor.prefix
    nested = prefix + tensor_names.GLOBAL_SCALE in infos
    if nested or _dtype(prefix + tensor_names.PACKED, infos) == "U8":
        nested |= _dtype(prefix + tensor_names.SCALE, infos) == "F8_E4M3"
        return tensor_names.compressed_fp4_names(prefix, infos, nested=nested)
    return tensor_names.compressed_names(prefix, infos)


def _dtype(name: str, infos: Mapping[str, TensorInfo]) -> str | None:
    return infos[name].dtype if name in infos else None


def _row_groups(packed: PackedTensors) -> int:
    return math.prod(packed.shape("weight_scale")[-1:] or (0,))


def _fp8_groups(packed: PackedTensors) -> int:
    return math.prod(packed.scale_shape) if packed.infos.keys() & _FP8_SCALES else 0


def _modelopt_scheme(packed: PackedTensors, _: Any) -> Scheme:
    return _fp4(packed)


def _fp4(packed: PackedTensors) -> Scheme:
    """NVFP4, or MXFP4 if the scales are exponents."""
    block = 32 if packed.dtype("weight_scale") in ("U8", "F8_E8M0") else 16
    return Scheme(kind="e2m1", block_size=block, double_quant=True, group_bits=8.0)


def _compressed_scheme(packed: PackedTensors, _: Any) -> Scheme:
    if packed.dtype("weight_packed") == "U8" or "weight_global_scale" in packed.infos:
        return _fp4(packed)
    words = math.prod(packed.shape("weight_packed")[-1:])
    bits = tensor_names.compressed_bits(words, packed.matrix[1])
    symmetric = "weight_zero_point" not in packed.infos
    return _integers(packed, _row_groups(packed), bits, symmetric=symmetric)


def _find_hqq(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    return hqq_config.names(tensor.prefix, infos)


def _hqq_groups(packed: PackedTensors) -> int:
    """HQQ stores the groups of a weight in one column."""
    groups, rows = math.prod(packed.shape("scale") or (0,)), packed.matrix[0]
    return groups // rows if groups % rows == 0 else 0


def _hqq_scheme(packed: PackedTensors, _: Any) -> Scheme:
    groups, count = _hqq_groups(packed), math.prod(packed.matrix)
    scale, codes = packed.infos["scale"], packed.infos["W_q"]
    hqq_config.check_axis(scale.shape, f"{packed.module}.scale", str(scale.file))
    held = hqq_config.held_bits(codes.nbytes, codes.dtype, count, groups * packed.matrix[0])
    kinds: Mapping[int | None, Kind] = {2: "int2", 3: "int3", 8: "int8"}
    return Scheme(
        kind=kinds.get(held, "int4"),
        group_size=_group_size(packed, groups),
        symmetric=False,
        group_bits=2 * 8 * DTYPES[scale.dtype][1],
    )


def _gguf_scheme(packed: PackedTensors, _: Any) -> Scheme:
    return gguf_schemes.SCHEMES[gguf_schemes.type_of(packed.infos)]


def _find_mlx(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    floats = _dtype(tensor.prefix + tensor_names.SCALES, infos) != "U8"
    return tensor_names.mlx_names(tensor.prefix, infos, affine=floats)


def _mlx_groups(packed: PackedTensors) -> int:
    return math.prod(packed.shape("scales")[-1:] or (0,))


def _mlx_scheme(packed: PackedTensors, _: Any) -> Scheme:
    size = packed.matrix[1] // max(_mlx_groups(packed), 1)
    if packed.dtype("scales") == "U8":
        return Scheme(kind="e2m1", block_size=size, double_quant=True, group_bits=8.0)
    words, scale = packed.infos.get("weight"), packed.infos.get("scales")
    bits = mlx_config.bits_of(words, packed.matrix, packed.module)
    return Scheme(
        kind=mlx_config.KINDS[bits],
        group_size=_group_size(packed, _mlx_groups(packed)),
        symmetric=False,
        group_bits=2 * 8 * DTYPES[scale.dtype][1] if scale else None,
    )


def _find_awq(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    found = tensor_names.awq_names(tensor.prefix, infos)
    return found if found and infos[found[0]].shape[:1] == tensor.shape[1:] else ()


def _gptq_groups(packed: PackedTensors) -> int:
    return math.prod(packed.shape("scales")[:1] or (0,))


def _awq_scheme(packed: PackedTensors, _: Any) -> Scheme:
    """It counts as asymmetric, although all zeros may be 8."""
    return _integers(packed, _gptq_groups(packed), 4, symmetric=False)


def _find_gptq(tensor: ModelTensor, infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    return tensor_names.gptq_names(tensor.prefix, infos)


def _read_gptq(document: Mapping[str, Any] | None, where: str) -> gptq_config.GPTQConfig:
    """GPTQ's settings; AWQ's other versions may look like GPTQ without g_idx and are named."""
    if document is not None and auto_round_config.named(document):
        return auto_round_config.read(document, where, "GPTQ")
    if document is not None and document.get("quant_method") == "awq":
        awq_config.read(document, where)
    return gptq_config.parse(document, where)


def _confirm_gptq(
    settings: gptq_config.GPTQConfig,
    modules: Collection[PackedModule],
    dense: Collection[Sequence[str]],
) -> None:
    module = auto_round_config if settings.auto_round else gptq_config
    module.confirm(settings, modules, dense)


def _read_awq(document: Mapping[str, Any] | None, where: str) -> gptq_config.GPTQConfig | Settings:
    if document is not None and auto_round_config.named(document):
        return auto_round_config.read(document, where, "AWQ")
    return awq_config.read(document, where)


def _confirm_awq(
    settings: gptq_config.GPTQConfig | Settings,
    modules: Collection[PackedModule],
    dense: Collection[Sequence[str]],
) -> None:
    if isinstance(settings, Settings):
        awq_config.confirm(settings, modules, dense)
    else:
        auto_round_config.confirm(settings, modules, dense)


def _optional_gptq(settings: gptq_config.GPTQConfig) -> frozenset[str]:
    return frozenset((tensor_names.G_IDX,) if settings.auto_round else ())


def _gptq_scheme(packed: PackedTensors, settings: gptq_config.GPTQConfig) -> Scheme:
    rows = math.prod(packed.shape("qweight")[:1])
    bits = tensor_names.gptq_bits(rows, packed.matrix[1])
    symmetric = settings.for_module(packed.module).symmetric
    return _integers(packed, _gptq_groups(packed), bits, symmetric=symmetric)


def _group_size(packed: PackedTensors, groups: int) -> int:
    """Inputs a group; -1 if that is a whole row of no usual size, as Affine says it."""
    size = packed.matrix[1] // max(groups, 1)
    return -1 if groups <= 1 and size not in GROUP_SIZES else size


def _integers(packed: PackedTensors, groups: int, bits: int | None, *, symmetric: bool) -> Scheme:
    size = packed.matrix[1] // max(groups, 1)
    return Scheme(
        kind=tensor_names.INTEGER_KINDS.get(bits or 4, "int4"),
        group_size=size if size in GROUP_SIZES else -1,
        symmetric=symmetric,
    )


LAYOUTS: tuple[LayoutHeaders, ...] = (
    LayoutHeaders(
        name="GGUF",
        kinds=_LINEAR | {"embedding"},
        find=gguf_schemes.find,
        read=lambda *_: None,
        scheme=_gguf_scheme,
        groups=lambda _: 0,
        confirm=lambda *_: None,
    ),
    LayoutHeaders(
        name="bitsandbytes",
        find=_find_bnb,
        read=bnb_config.read,
        scheme=_bnb_scheme,
        groups=_bnb_blocks,
        confirm=bnb_config.confirm,
    ),
    LayoutHeaders(
        name="ModelOpt",
        file=modelopt_config.FILE,
        find=_find_modelopt,
        read=modelopt_config.read,
        scheme=_modelopt_scheme,
        groups=_row_groups,
        confirm=modelopt_config.confirm,
    ),
    LayoutHeaders(
        name="FP8",
        file=modelopt_config.FILE,
        find=_find_fp8,
        read=fp8_config.read,
        scheme=lambda *_: DENSE,
        groups=_fp8_groups,
        confirm=fp8_config.confirm,
    ),
    LayoutHeaders(
        name="compressed-tensors",
        find=_find_compressed,
        read=compressed_config.read,
        scheme=_compressed_scheme,
        groups=_row_groups,
        confirm=compressed_config.CompressedConfig.confirm,
    ),
    LayoutHeaders(
        name="HQQ",
        find=_find_hqq,
        read=hqq_config.read,
        scheme=_hqq_scheme,
        groups=_hqq_groups,
        confirm=hqq_config.confirm,
    ),
    LayoutHeaders(
        name="MLX",
        kinds=_LINEAR | {"embedding"},
        field=mlx_config.FIELD,
        find=_find_mlx,
        read=mlx_config.read,
        scheme=_mlx_scheme,
        groups=_mlx_groups,
        confirm=mlx_config.confirm,
    ),
    LayoutHeaders(
        name="AWQ",
        file=awq_config.FILE,
        find=_find_awq,
        read=_read_awq,
        scheme=_awq_scheme,
        groups=_gptq_groups,
        confirm=_confirm_awq,
    ),
    LayoutHeaders(
        name="GPTQ",
        file=gptq_config.FILE,
        find=_find_gptq,
        read=_read_gptq,
        scheme=_gptq_scheme,
        groups=_gptq_groups,
        confirm=_confirm_gptq,
        optional=_optional_gptq,
    ),
)
LAYOUT_OF: Mapping[Layout, LayoutHeaders] = {layout.name: layout for layout in LAYOUTS}
