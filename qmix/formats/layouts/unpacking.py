"""The tensors of one packed weight -> the weight: a reader for each layout.

Knows nothing of files.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from qmix.formats.layouts import (
    awq,
    bnb,
    compressed_tensors,
    fp4,
    fp8,
    gguf,
    gguf_schemes,
    gptq,
    hqq,
    mlx,
    mlx_config,
)
from qmix.formats.layouts.gptq_config import GPTQConfig
from qmix.formats.layouts.headers import LAYOUT_OF
from qmix.formats.layouts.packed_tensors import PackedTensors
from qmix.formats.layouts.tensor_names import Layout
from qmix.weights.dense import Weight

# (tensors by canonical name, what headers say, the file for errors, the layout's settings)
Unpack = Callable[[Mapping[str, Tensor], PackedTensors, str, Any], Weight]

# The layouts whose weights hold the file's tensors as they are stored; others build new ones.
_AS_STORED: frozenset[Layout] = frozenset(("bitsandbytes", "ModelOpt", "compressed-tensors", "MLX"))


def as_stored(packed: PackedTensors) -> bool:
    """Whether the weight holds the file's tensors as they are; if not, new ones are built."""
    return packed.layout in _AS_STORED and not (
        packed.layout == "MLX" and mlx_config.rearranged(packed.infos["weight"], packed.matrix)
    )


# The layouts that are unpacked by torch's operations alone, on whichever device the tensors lie.
_ON_ANY_DEVICE: frozenset[Layout] = frozenset(("bitsandbytes", "GPTQ"))


def on_any_device(packed: PackedTensors) -> bool:
    """Whether the weight is unpacked where its tensors lie; if not, on the host alone."""
    return packed.layout in _ON_ANY_DEVICE


def _of_matrix(
    unpack: Callable[[Mapping[str, Tensor], str, str, tuple[int, int]], Weight],
) -> Unpack:
    """The reader of a layout whose tensors say all: (tensors, module, file, (N, K)) -> weight."""
    return lambda tensors, packed, where, _: unpack(
        tensors, packed.tensor.prefix, where, packed.matrix
    )


def _gguf(tensors: Mapping[str, Tensor], packed: PackedTensors, where: str, _: Any) -> Weight:
    (data,) = tensors.values()
    kind = gguf_schemes.type_of(packed.infos)
    return gguf.unpack(data, kind, packed.module, where, packed.matrix)


def _bnb(tensors: Mapping[str, Tensor], packed: PackedTensors, where: str, _: Any) -> Weight:
    return bnb.unpack(tensors, packed.tensor.prefix, where)


def _compressed(tensors: Mapping[str, Tensor], packed: PackedTensors, where: str, _: Any) -> Weight:
    if LAYOUT_OF[packed.layout].scheme(packed, None).kind == "e2m1":
        return fp4.unpack_compressed(tensors, packed.tensor.prefix, where, packed.matrix)
    return compressed_tensors.unpack(tensors, packed.tensor.prefix, where, packed.matrix)


def _awq(tensors: Mapping[str, Tensor], packed: PackedTensors, where: str, settings: Any) -> Weight:
    if isinstance(settings, GPTQConfig):  # AutoRound's
        zero_point = not settings.for_module(packed.module).symmetric
    else:
        zero_point = settings.flag("zero_point") is not False
    return awq.unpack(tensors, packed.tensor.prefix, where, packed.matrix, zero_point=zero_point)


def _gptq(
    tensors: Mapping[str, Tensor], packed: PackedTensors, where: str, settings: Any
) -> Weight:
    of_module = settings.for_module(packed.module)
    return gptq.unpack(tensors, packed.tensor.prefix, where, packed.matrix, of_module)


UNPACK: Mapping[Layout, Unpack] = {
    "GGUF": _gguf,
    "bitsandbytes": _bnb,
    "ModelOpt": _of_matrix(fp4.unpack_modelopt),
    "FP8": _of_matrix(fp8.unpack),
    "compressed-tensors": _compressed,
    "AWQ": _awq,
    "GPTQ": _gptq,
    "HQQ": _of_matrix(hqq.unpack),
    "MLX": _of_matrix(mlx.unpack),
}
