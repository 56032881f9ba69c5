"""Scheme: how one tensor is stored. Recipe: which tensor gets which scheme.

Needs no torch. Knows nothing of tensors in memory or of file formats.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from qmix.errors import UsageError

_Tables = Literal["nf4", "fp4", "e2m1", "iq4", "iq3_xxs", "iq3_s", "iq2", "iq1"]
_Integers = Literal["int2", "int3", "int4", "int5", "int6", "int8"]
Kind = Literal["dense", _Tables, _Integers]

# The tables that only GGUF files have.
GGUF_TABLES: tuple[Kind, ...] = ("iq4", "iq3_xxs", "iq3_s", "iq2", "iq1")
# Absmax values that share one fp32 scale under double quantization (QLoRA, section 3).
NESTED_BLOCK = 256
_WHOLE_SCALE = 4  # bytes of the float32 that multiplies all scales of an E2M1 weight
NF4_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUP_SIZES = (32, 64, 128)


def check_group_size(size: int) -> None:
    """Refuse a group of inputs that no integer scheme has; -1 means all inputs.

    Raises:
        UsageError: it is neither -1 nor one of GROUP_SIZES.
    """
    if size not in (-1, *GROUP_SIZES):
        raise UsageError(
            "no such group size",
            where="--group-size",
            expected=f"-1 or one of {', '.join(map(str, GROUP_SIZES))}",
            found=size,
        )


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the weight of one linear layer is stored.

    `dense`: 16 or 32 bits a weight. `nf4`: 4-bit NormalFloat codes with one absmax per `block_size`
    consecutive weights (QLoRA, arXiv 2305.14314); with `double_quant`, the absmax is stored in 8
    bits. `fp4`, `e2m1`, `iq4` to `iq1`: the same with other tables of 16 values. `int2` to `int8`:
    integers of so many bits with one 16-bit scale per `group_size` consecutive inputs of an output
    (-1: all inputs), and one zero with the bits of a code unless `symmetric`. `group_bits` are the
    bits of a group or block beside its codes where they are others than that.
    """

    kind: Kind
    block_size: int = 64
    double_quant: bool = True
    group_size: int = 128
    symmetric: bool = True
    group_bits: float | None = None

    @property
    def integer(self) -> bool:
        """Whether the codes are integers: `int2` to `int8`."""
        return self.kind.startswith("int")

    @property
    def bits(self) -> int:
        """Bits of a code, without scales; 16 for `dense`."""
        return int(self.kind[3:]) if self.integer else 16 if self.kind == "dense" else 4

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight with scales; 16 for `dense`. One scale for all inputs counts as nothing."""
        if self.kind == "dense" or (self.integer and self.group_size == -1):
            return float(self.bits)
        size = self.group_size if self.integer else self.block_size
        return self.bits + self._bits_a_group / size

    @property
    def _bits_a_group(self) -> float:
        if self.group_bits is not None:
            return self.group_bits
        if self.integer:
            return 16 if self.symmetric else 16 + self.bits
        return 8 + 32 / NESTED_BLOCK if self.double_quant else 32

    def nbytes(self, shape: tuple[int, ...], *, scale_bytes: int = 2) -> int:
        """Bytes in memory of codes, scales, zeros and biases of a weight [N, K].

        Tables and permutations are not counted. A zero that is a code takes a byte.

        Args:
            scale_bytes: of a plain scale of integers.
        """
        codes, groups = -(-math.prod(shape) * self.bits // 8), self.groups(shape)
        if self.kind == "dense":
            return codes
        if self.group_bits is not None:
            whole = _WHOLE_SCALE if self.kind == "e2m1" and self.double_quant else 0
            return codes + math.ceil(groups * self.group_bits / 8) + whole
        if self.integer:
            return codes + groups * (scale_bytes + (0 if self.symmetric else 1))
        if self.double_quant:
            return codes + groups + 4 * -(-groups // NESTED_BLOCK)
        return codes + 4 * groups

    def groups(self, shape: tuple[int, ...]) -> int:
        """How many groups, or blocks, a weight [N, K] has."""
        if not self.integer:
            return -(-math.prod(shape) // self.block_size)
        size = shape[-1] if self.group_size == -1 else self.group_size
        return math.prod(shape) // size

    def __str__(self) -> str:
        if self.kind == "dense":
            return "16-bit"
        if self.integer:
            group = "per output" if self.group_size == -1 else f"g{self.group_size}"
            return f"{self.kind} {group}" + ("" if self.symmetric else " asymmetric")
        return f"{self.kind} b{self.block_size}" + (" double-quant" if self.double_quant else "")


DENSE = Scheme(kind="dense")
NF4 = Scheme(kind="nf4")

_EXPERTS = r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.w[123]\.weight"
_ATTENTION = r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight"


@dataclass(frozen=True)
class Recipe:
    """Patterns of tensor names with their schemes; the first full match wins, others stay dense."""

    rules: tuple[tuple[str, Scheme], ...]

    @classmethod
    def uniform(cls, scheme: Scheme, *, attention: bool) -> "Recipe":
        """Every expert matrix in `scheme`, and with `attention` its four projections too.

        Router, norms, embeddings and lm_head are never matched; they stay in 16 bits.
        """
        rules = [(_EXPERTS, scheme)]
        if attention:
            rules.append((_ATTENTION, scheme))
        return cls(tuple(rules))

    def scheme_of(self, name: str) -> Scheme:
        """The scheme of the tensor `name`, a Hugging Face name that ends in `.weight`."""
        for pattern, scheme in self.rules:
            if re.fullmatch(pattern, name):
                return scheme
        return DENSE
