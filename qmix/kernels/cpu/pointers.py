"""Weights as the C structures that point to them.

What a structure points to is appended to `references`, which must live as long as the structure.
Knows nothing of the library that reads them.
"""

from collections.abc import Sequence
from ctypes import addressof, c_void_p
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from qmix.kernels.cpu import ctypes_structs as structs
from qmix.weights.affine import Affine, symmetric_zero
from qmix.weights.dense import Weight
from qmix.weights.scales import Scales
from qmix.weights.table import Table

# The numbers of ValueKind in csrc/structs.h; those of nested values by the bits of a code.
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3}
_NESTED_KINDS = {8: 4, 6: 5}
_CODES = torch.arange(16, dtype=torch.float32)
# The values of the first 16 codes of an affine weight without zeros and biases, by its bits.
_SYMMETRIC_CODES = {bits: _CODES - symmetric_zero(bits) for bits in (2, 3, 4, 5, 6, 8)}


@dataclass(frozen=True, eq=False)
class TokenLayer:
    """The weights of a decoder layer that one token passes, as the compiled kernels read them.

    Attributes:
        pointers: where the weights lie.
        qkv_outputs: outputs of q, k and v together.
        has_experts: whether the experts are among the weights.
        references: what the pointers point to.
    """

    pointers: structs.TokenLayer
    qkv_outputs: int
    has_experts: bool
    references: tuple[object, ...]

    @classmethod
    def of(
        cls,
        projections: Sequence[Table | Affine],
        norms: Sequence[Tensor],
        router: Tensor,
        experts: Sequence[tuple[Table | Affine, Table | Affine, Table | Affine]] | None,
        *,
        eps: float,
        head_dim: int,
        chosen: int,
    ) -> "TokenLayer":
        """The structure of one layer.

        Args:
            projections: q, k, v and o.
            norms: the weights [D] of the norms before and after attention, bfloat16.
            router: [E, D], bfloat16.
            experts: gate, up and down of each expert; None leaves the experts to the caller.
            chosen: experts a token.
        """
        references: list[Tensor] = [*norms, router]
        matrices = [matrix_of(weight, references) for weight in projections]
        perms = (c_void_p * 4)(*(perm_of(weight, references) for weight in projections))
        array = None
        if experts is not None:
            array = (structs.ExpertMatrices * len(experts))(
                *(expert_of(expert, references) for expert in experts)
            )
        pointers = structs.TokenLayer(
            *matrices,
            perms,
            *(norm.data_ptr() for norm in norms),
            router.data_ptr(),
            None if array is None else addressof(array),
            router.shape[1],
            head_dim,
            router.shape[0],
            chosen,
            eps,
        )
        outputs = sum(weight.shape[0] for weight in projections[:3])
        return cls(pointers, outputs, array is not None, (*references, array))


def expert_of(
    matrices: tuple[Table | Affine, Table | Affine, Table | Affine], references: list[Tensor]
) -> structs.ExpertMatrices:
    """The structure of gate, up and down."""
    perms = (perm_of(matrix, references) for matrix in matrices)
    return structs.ExpertMatrices(*(matrix_of(matrix, references) for matrix in matrices), *perms)


def takes(weight: Weight | None) -> TypeGuard[Table | Affine]:
    """Whether the compiled kernels multiply a weight straight from its codes."""
    return isinstance(weight, Table | Affine)


def perm_of(weight: Table | Affine, references: list[Tensor]) -> int | None:
    """The address of the order in which an act-order weight stores its inputs, int32 [K]."""
    if isinstance(weight, Table) or weight.perm is None:
        return None
    references.append(weight.perm.int().contiguous())
    return references[-1].data_ptr()


def matrix_of(weight: Table | Affine, references: list[Tensor]) -> structs.Matrix:
    """The structure of one weight."""

    def pointer(tensor: Tensor) -> int:
        references.append(tensor.contiguous())
        return references[-1].data_ptr()

    def values(part: Scales | None) -> structs.GroupValues:
        if part is None:
            return structs.GroupValues()
        if isinstance(part, Tensor):
            return structs.GroupValues(values=pointer(part), kind=_KINDS[part.dtype])
        start, step = part.line
        return structs.GroupValues(
            values=pointer(part.codes),
            outer=pointer(part.outer),
            map=pointer(part.map),
            block=part.block,
            start=start,
            step=step,
            offset=part.offset,
            kind=_NESTED_KINDS[part.bits],
            outer_kind=_KINDS[part.outer.dtype],
        )

    rows, inputs = weight.shape
    matrix = structs.Matrix(codes=pointer(weight.codes), rows=rows, inputs=inputs)
    matrix.scales = values(weight.scales)
    if isinstance(weight, Table):
        matrix.table, matrix.bits = pointer(weight.table), 4
        matrix.block, matrix.high_first = weight.block_size, int(weight.high_first)
        return matrix
    matrix.table = pointer(_SYMMETRIC_CODES[weight.bits] if weight.symmetric else _CODES)
    matrix.bits, matrix.block = weight.bits, weight.group_inputs
    matrix.zeros, matrix.biases = values(weight.zeros), values(weight.biases)
    return matrix
