"""The layout in which qmix writes each kind of weight, and the settings that describe the whole.

One table for the quantizers, for `save_pretrained` and for synthetic checkpoints: NF4 and FP4 as
bitsandbytes, Int4 and Int8 as GPTQ, dense weights as they are. Knows nothing of files.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.formats.layouts import bnb, gptq, gptq_config
from qmix.weights.dense import Dense, Weight
from qmix.weights.integers import Integers
from qmix.weights.nf4 import NF4
from qmix.weights.scheme import DENSE, Scheme

Layout = Literal["bitsandbytes", "GPTQ"]
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def layout_of(schemes: Mapping[str, Scheme]) -> Layout | None:
    """The one layout of all packed weights, by their modules' names; None if all are dense.

    Raises:
        UnsupportedError: two layouts, which no `quantization_config` describes.
    """
    found: dict[Layout, str] = {}
    for module, scheme in schemes.items():
        if scheme.kind != "dense":
            found.setdefault("GPTQ" if scheme.integer else "bitsandbytes", module)
    if len(found) > 1:
        named = (f"{module} is {schemes[module]}" for module in found.values())
        raise UnsupportedError(
            "two layouts do not fit one checkpoint",
            expected="NF4 or FP4 weights (bitsandbytes), or Int4 and Int8 weights (GPTQ)",
            found=" and ".join(named),
            remedy="Quantize the original checkpoint with one method.",
        )
    return next(iter(found), None)


def packed_specs(prefix: str, shape: tuple[int, ...], scheme: Scheme, dtype: torch.dtype) -> Specs:
    """Names, dtypes and shapes (bitsandbytes' state: its longest) of what `pack` will give.

    Args:
        prefix: the module's name.
        shape: (N, K); of any length if dense.
        dtype: of a dense weight, of the weight that NF4 or FP4 was rounded from, of integers' scales.

    Raises:
        UnsupportedError: integers whose outputs or inputs fill no whole words or groups.
    """
    if scheme.kind == "dense":
        return {f"{prefix}.weight": (dtype, shape)}
    rows, columns = shape
    if scheme.integer:
        return gptq.packed_specs(prefix, (rows, columns), scheme, dtype)
    return bnb.packed_specs(prefix, (rows, columns), scheme, dtype)


def pack(weight: Weight, prefix: str, *, version: int = 1) -> dict[str, Tensor]:
    """What a file holds of one weight, by tensor name, on the CPU.

    Args:
        version: of GPTQ; see `version_of`.

    Raises:
        UnsupportedError: a zero of 0 in version 1.
    """
    weight = weight.to(torch.device("cpu"))
    if isinstance(weight, Dense):
        return {f"{prefix}.weight": weight.data}
    if isinstance(weight, NF4):
        return bnb.pack(weight, prefix)
    assert isinstance(weight, Integers), type(weight)
    return gptq.pack(weight, prefix, version)


def version_of(weights: Iterable[Weight]) -> int:
    """GPTQ's version that stores all of them exactly: 1 if no zero is 0, else 2."""
    return gptq.version_of(weight for weight in weights if isinstance(weight, Integers))


def act_order(weights: Iterable[Weight]) -> bool:
    """Whether the inputs of any weight are scattered over its groups."""
    return any(isinstance(weight, Integers) and weight.perm is not None for weight in weights)


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
        dtype: in which products are computed.
        version, act_order: of GPTQ's weights.

    Raises:
        UnsupportedError: two layouts.
    """
    match layout_of(schemes):
        case "bitsandbytes":
            scheme = next(scheme for scheme in schemes.values() if scheme.kind != "dense")
            settings = bnb.config(scheme, dtype, attention=True)
            return {**settings, "llm_int8_skip_modules": _dense_names(schemes)}
        case "GPTQ":
            return gptq_config.config(schemes, version=version, act_order=act_order)
        case None:
            return None


def _dense_names(schemes: Mapping[str, Scheme]) -> list[str]:
    """The dense modules by the last part of their names, which stands for all, or in full."""
    by_part: dict[str, list[str]] = {"lm_head": [], "gate": []}
    for module in schemes:
        by_part.setdefault(module.rpartition(".")[2], []).append(module)
    found: list[str] = []
    for part, modules in by_part.items():
        dense = [module for module in modules if schemes[module] == DENSE]
        found += [part] if len(dense) == len(modules) and dense else dense
    return found
