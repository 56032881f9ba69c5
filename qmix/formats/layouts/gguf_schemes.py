"""How a weight of each of GGUF's types is kept, and which tensor holds a weight.

Reads no data. Knows no torch.
"""

from collections.abc import Collection, Mapping
from typing import Literal

from qmix.formats.names import ModelTensor
from qmix.weights.scheme import Scheme

_BLOCK = 256  # weights that share a float16


def _integers(
    kind: Literal["int2", "int3", "int4", "int5", "int6", "int8"],
    group: int,
    group_bits: float | None,
    *,
    symmetric: bool,
) -> Scheme:
    return Scheme(kind=kind, group_size=group, symmetric=symmetric, group_bits=group_bits)


def _table(kind: Literal["iq3_xxs", "iq3_s", "iq2", "iq1"], block: int) -> Scheme:
    """Scales of six bits in memory (in files of three or four), and a float16 for 256 weights."""
    bits = 6 + 16 * block / _BLOCK
    return Scheme(kind=kind, block_size=block, double_quant=True, group_bits=bits)


# Symmetric weights with a float16 a group are like those of GPTQ. Of the others, a scale or bias
# takes 16 bits; or six and an eighth of a float16, which are 8; or eight and a sixteenth, 9.
SCHEMES: Mapping[str, Scheme] = {
    "Q4_0": _integers("int4", 32, None, symmetric=True),
    "Q4_1": _integers("int4", 32, 32, symmetric=False),
    "Q4_K": _integers("int4", 32, 16, symmetric=False),
    "IQ4_NL": Scheme(kind="iq4", block_size=32, double_quant=False, group_bits=16),
    "IQ4_XS": Scheme(kind="iq4", block_size=32, double_quant=True, group_bits=8),
    "Q5_0": _integers("int5", 32, None, symmetric=True),
    "Q5_1": _integers("int5", 32, 32, symmetric=False),
    "Q5_K": _integers("int5", 32, 16, symmetric=False),
    "Q6_K": _integers("int6", 16, 9, symmetric=True),
    "Q8_0": _integers("int8", 32, None, symmetric=True),
    "Q2_K": _integers("int2", 16, 14, symmetric=False),
    "Q3_K": _integers("int3", 16, 7, symmetric=True),
    "MXFP4": Scheme(kind="e2m1", block_size=32, double_quant=True, group_bits=8),
    "IQ1_S": _table("iq1", 32),
    "IQ1_M": _table("iq1", 16),
    "IQ2_XXS": _table("iq2", 32),
    "IQ2_XS": _table("iq2", 16),
    "IQ2_S": _table("iq2", 16),
    "IQ3_XXS": _table("iq3_xxs", 32),
    "IQ3_S": _table("iq3_s", 32),
}


def find(tensor: ModelTensor, names: Collection[str]) -> tuple[str, ...]:
    """The name of the tensor `P.TYPE` that holds a weight; none if it has another layout."""
    found = (f"{tensor.prefix}.{kind}" for kind in SCHEMES)
    return tuple(name for name in found if name in names)[:1]


def type_of(names: Collection[str]) -> str:
    """GGUF's type of a packed weight, by what its tensor's name has after the module's."""
    (kind,) = names
    return kind
