"""The layout in which qmix writes each kind of weight, and the settings that describe the whole.

NF4 and FP4 are written as bitsandbytes, integers of 2, 3, 4 and 8 bits as GPTQ, dense weights as
they are. The quantizers, `save_pretrained` and synthetic checkpoints share this table. Knows
nothing of files.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.formats.layouts import bnb, gptq, gptq_config
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense, Weight
from qmix.weights.scheme import DENSE, Scheme
from qmix.weights.table import Table

_WRITTEN = ("nf4", "fp4", "int2", "int3", "int4", "int8")
WrittenLayout = Literal["bitsandbytes", "GPTQ"]


def layout_of(schemes: Mapping[str, Scheme]) -> WrittenLayout | None:
    """The one layout of all packed weights; None if all weights are dense.

    Args:
        schemes: by module name.

    Raises:
        UnsupportedError: two layouts, which no `quantization_config` describes.
    """
    examples: dict[WrittenLayout, str] = {}  # layout -> a module that has it
    for module, scheme in schemes.items():
        if scheme.kind != "dense":
            examples.setdefault("GPTQ" if scheme.integer else "bitsandbytes", module)
    if len(examples) > 1:
        raise UnsupportedError(
            "two layouts do not fit into one checkpoint",
            expected="NF4 or FP4 weights (bitsandbytes), or integers (GPTQ)",
            found=" and ".join(f"{module} is {schemes[module]}" for module in examples.values()),
            remedy="Quantize the original checkpoint with one method.",
        )
    return next(iter(examples), None)


def packed_specs(
    prefix: str, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors that `pack` will return; the length of bitsandbytes' state is an upper bound.

    Args:
        prefix: the module's name.
        shape: (N, K); any shape if dense.
        dtype: of a dense weight; of the weight that was rounded to NF4 or FP4; of integers' scales.

    Raises:
        UnsupportedError: integers whose outputs or inputs do not fill whole words or groups; a
            weight that neither layout holds.
    """
    if scheme.kind == "dense":
        return (TensorSpec(f"{prefix}.weight", dtype, shape),)
    embedding = prefix.endswith("embed_tokens")
    if embedding or scheme.kind not in _WRITTEN or scheme.group_bits is not None:
        raise UnsupportedError(
            f"module {prefix}: no layout that qmix writes holds such a weight",
            expected="NF4, FP4, or integers of 2, 3, 4 or 8 bits with plain scales and whole zeros",
            found=f"{scheme}, {scheme.bits_per_weight:g} bits a weight",
            remedy="Copy the folder that the model was loaded from: it holds the same weights.",
        )
    rows, columns = shape
    if scheme.integer:
        return gptq.packed_specs(prefix, (rows, columns), scheme, dtype)
    return bnb.packed_specs(prefix, (rows, columns), scheme, dtype)


def pack(weight: Weight, prefix: str, *, version: int = 1) -> dict[str, Tensor]:
    """The tensors that a file holds of one weight, by name, on the CPU.

    Args:
        version: of GPTQ; see `version_of`.

    Raises:
        UnsupportedError: a zero of 0 in version 1.
    """
    weight = weight.to(torch.device("cpu"))
    if isinstance(weight, Dense):
        return {f"{prefix}.weight": weight.data}
    if isinstance(weight, Table):
        return bnb.pack(weight, prefix)
    assert isinstance(weight, Affine), type(weight)
    return gptq.pack(weight, prefix, version)


def version_of(weight: Weight) -> int:
    """The version of GPTQ that stores a weight exactly: 2 if a zero is 0, else 1."""
    return gptq.version_of(weight) if isinstance(weight, Affine) else 1


def act_order(weight: Weight) -> bool:
    """Whether a weight's inputs are scattered over its groups."""
    return isinstance(weight, Affine) and weight.perm is not None


def quantization_config(
    schemes: Mapping[str, Scheme],
    dtype: torch.dtype,
    *,
    version: int = 1,
    act_order: bool = False,
) -> dict[str, object] | None:
    """config.json's `quantization_config`; None if every weight is dense.

    Args:
        schemes: of every linear layer by its module's name, dense ones included.
        dtype: in which matmuls compute.
        version, act_order: of GPTQ's weights.

    Raises:
        UnsupportedError: two layouts.
    """
    match layout_of(schemes):
        case "bitsandbytes":
            scheme = next(scheme for scheme in schemes.values() if scheme.kind != "dense")
            return bnb.quantization_config(scheme, dtype, dense_names(schemes))
        case "GPTQ":
            return gptq_config.quantization_config(schemes, version=version, act_order=act_order)
        case None:
            return None


def dense_names(schemes: Mapping[str, Scheme]) -> list[str]:
    """The dense modules, by the last part of their names if all modules that share it are dense."""
    by_part: dict[str, list[str]] = {"lm_head": [], "gate": []}
    for module in schemes:
        by_part.setdefault(module.rpartition(".")[2], []).append(module)
    dense_names: list[str] = []
    for part, modules in by_part.items():
        dense = [module for module in modules if schemes[module] == DENSE]
        dense_names += [part] if len(dense) == len(modules) and dense else dense
    return dense_names
