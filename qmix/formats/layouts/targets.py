"""What `qmix export` writes in each format: a row for each, asked for one weight after another.

`Fitting` says which weights a format holds; the rows add the tensors' names and the settings. GGUF
is a container of its own: formats.gguf.writer. Knows no files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qmix.formats.layouts import (
    awq,
    awq_config,
    bnb,
    compressed_tensors,
    gptq,
    gptq_config,
    mlx,
    mlx_config,
)
from qmix.formats.layouts.fitting import (
    Fitting,
    GGUFFitting,
    IntegerFitting,
    MLXFitting,
    TableFitting,
)
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.layouts.writer import dense_names
from qmix.formats.names import TensorKind
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.scheme import Scheme

Format = Literal["gptq", "awq", "compressed-tensors", "mlx", "gguf", "nf4"]

_LINEAR: frozenset[TensorKind] = frozenset(("attention", "router", "expert", "head"))


@dataclass(frozen=True)
class Described:
    """What settings say of a whole checkpoint.

    Attributes:
        schemes: of every linear layer by its classic name, and of the embedding if it is packed.
        dtype: of the checkpoint's 16-bit weights.
        act_order: whether any weight's inputs are scattered over its groups.
    """

    schemes: Mapping[str, Scheme]
    dtype: torch.dtype
    act_order: bool


@dataclass(frozen=True, kw_only=True)
class Target:
    """One format.

    Attributes:
        layout: of its packed tensors.
        fitting: which forms of a weight it holds.
        kinds: of the weights that may be packed.
        stacked: whether the experts of a layer lie in one tensor, and so share one form.
        uniform: whether all packed weights share one form.
        packed_specs: (module, (N, K), scheme, dtype of the scales) -> the tensors of a weight.
        pack: (weight, module) -> the same with their data.
        settings: the fields of config.json that describe the packed weights.
        file: the file beside config.json that repeats them; None if there is none.
        metadata: what the safetensors files call their format.
    """

    layout: Layout
    fitting: Fitting
    kinds: frozenset[TensorKind] = _LINEAR
    stacked: bool = False
    uniform: bool = False
    packed_specs: Callable[[str, tuple[int, int], Scheme, torch.dtype], tuple[TensorSpec, ...]]
    pack: Callable[[Any, str], dict[str, Tensor]]
    settings: Callable[[Described], dict[str, object]]
    file: str | None = None
    metadata: str = "pt"


def _gptq(described: Described) -> dict[str, object]:
    schemes = described.schemes
    settings = gptq_config.quantization_config(schemes, act_order=described.act_order)
    return {"quantization_config": settings}


def _awq(described: Described) -> dict[str, object]:
    size = next(s.group_size for s in described.schemes.values() if s.integer)
    settings = awq_config.quantization_config(size, dense_names(described.schemes))
    return {"quantization_config": settings}


def _compressed(described: Described) -> dict[str, object]:
    return {"quantization_config": compressed_tensors.quantization_config(described.schemes)}


def _bnb(described: Described) -> dict[str, object]:
    scheme = next(s for s in described.schemes.values() if s.kind != "dense")
    dense = dense_names(described.schemes)
    return {"quantization_config": bnb.quantization_config(scheme, described.dtype, dense)}


def _mlx(described: Described) -> dict[str, object]:
    packed = {module: s for module, s in described.schemes.items() if s.kind != "dense"}
    settings = mlx_config.quantization_config(packed)
    return {mlx_config.FIELD: settings, "quantization_config": settings}


TARGETS: Mapping[Format, Target] = {
    "gptq": Target(
        layout="GPTQ",
        fitting=IntegerFitting(bits=(4, 8), zeros=1, order=True),
        packed_specs=gptq.packed_specs,
        pack=gptq.pack,
        settings=_gptq,
        file=gptq_config.FILE,
    ),
    "awq": Target(
        layout="AWQ",
        fitting=IntegerFitting(bits=(4,), zeros=0, sizes=True),
        uniform=True,
        packed_specs=awq.packed_specs,
        pack=awq.pack,
        settings=_awq,
        file=awq_config.FILE,
    ),
    "compressed-tensors": Target(
        layout="compressed-tensors",
        fitting=IntegerFitting(bits=(4, 8), lanes=False),
        packed_specs=compressed_tensors.packed_specs,
        pack=compressed_tensors.pack,
        settings=_compressed,
    ),
    "mlx": Target(
        layout="MLX",
        fitting=MLXFitting(),
        kinds=_LINEAR | {"embedding"},
        stacked=True,
        packed_specs=mlx.packed_specs,
        pack=mlx.pack,
        settings=_mlx,
        metadata="mlx",
    ),
    "nf4": Target(
        layout="bitsandbytes",
        fitting=TableFitting(),
        uniform=True,
        packed_specs=bnb.packed_specs,
        pack=bnb.pack,
        settings=_bnb,
    ),
}
GGUF_FITTING = GGUFFitting()
GGUF_KINDS: frozenset[TensorKind] = _LINEAR | {"embedding"}
