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
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import NESTED_BLOCK
from qmix.weights.table import Table

# The numbers of ScaleKind in csrc/structs.h.
_SCALE_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NESTED = 3
_CODES = torch.arange(16, dtype=torch.float32)
_SYMMETRIC_CODES = _CODES - symmetric_zero(4)


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
    """The structure of gate, up and down; its routing weight is not set."""
    perms = (perm_of(matrix, references) for matrix in matrices)
    return structs.ExpertMatrices(*(matrix_of(matrix, references) for matrix in matrices), *perms)


def takes(weight: Weight | None) -> TypeGuard[Table | Affine]:
    """Whether the compiled kernels multiply a weight straight from its codes."""
    if isinstance(weight, Table):
        scales = weight.scales
        return not isinstance(scales, NestedScales) or (
            (scales.bits, scales.block, scales.outer.dtype) == (8, NESTED_BLOCK, torch.float32)
        )
    return (
        isinstance(weight, Affine)
        and weight.bits == 4
        and isinstance(weight.scales, Tensor)
        and weight.biases is None
        and (weight.zeros is None or weight.zeros.dtype == torch.uint8)
    )


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

    rows, inputs = weight.shape
    matrix = structs.Matrix(codes=pointer(weight.codes), rows=rows, inputs=inputs)
    if isinstance(weight, Affine):
        assert isinstance(weight.scales, Tensor)
        matrix.table = pointer(_CODES if weight.zeros is not None else _SYMMETRIC_CODES)
        matrix.scales, matrix.scale_kind = pointer(weight.scales), _SCALE_KINDS[weight.scales.dtype]
        matrix.high_first, matrix.block = 0, weight.group_inputs
        if weight.zeros is not None:
            matrix.zeros = pointer(weight.zeros)
        return matrix
    matrix.table, matrix.block = pointer(weight.table), weight.block_size
    matrix.high_first = int(weight.high_first)
    scales = weight.scales
    if isinstance(scales, NestedScales):
        matrix.scales, matrix.scale_kind = pointer(scales.codes), _NESTED
        matrix.nested_absmax, matrix.nested_map = pointer(scales.outer), pointer(scales.map)
        matrix.offset = scales.offset
    else:
        matrix.scales, matrix.scale_kind = pointer(scales), _SCALE_KINDS[scales.dtype]
    return matrix
