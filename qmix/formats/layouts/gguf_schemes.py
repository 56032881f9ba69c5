"""How a weight of each of GGUF's types is kept, and which tensor holds a weight.

Reads no data. Knows no torch.
"""

from collections.abc import Collection, Mapping
from typing import Literal

from qmix.formats.names import ModelTensor
from qmix.weights.scheme import Scheme


def _integers(
    kind: Literal["int4", "int5", "int6", "int8"],
    group: int,
    group_bits: float | None,
    *,
    symmetric: bool,
) -> Scheme:
    return Scheme(kind=kind, group_size=group, symmetric=symmetric, group_bits=group_bits)


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
}


def find(tensor: ModelTensor, names: Collection[str]) -> tuple[str, ...]:
    """The name of the tensor `P.TYPE` that holds a weight; none if it has another layout."""
    found = (f"{tensor.prefix}.{kind}" for kind in SCHEMES)
    return tuple(name for name in found if name in names)[:1]


def type_of(names: Collection[str]) -> str:
    """GGUF's type of a packed weight, by what its tensor's name has after the module's."""
    (kind,) = names
    return kind
