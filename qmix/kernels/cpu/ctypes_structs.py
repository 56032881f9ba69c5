"""What the compiled products take: weights as structures of pointers.

Their fields are those of the C structures of the same names (TokenLayer's in TokenLayerFields). A structure keeps nothing alive: `held` is given
the tensors that its pointers point to.
"""

from collections.abc import Sequence
from ctypes import Structure, addressof, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.weights.integers import Int4, symmetric_zero
from qmix.weights.nf4 import NF4, NestedAbsmax

_SCALES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NESTED = 3
_CODES = torch.arange(16, dtype=torch.float32)
_SYMMETRIC = _CODES - symmetric_zero(4)


class Matrix(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("table", c_void_p),
        ("nested_absmax", c_void_p),
        ("nested_map", c_void_p),
        ("rows", c_int64),
        ("inputs", c_int64),
        ("block", c_int64),
        ("offset", c_float),
        ("scale_kind", c_int32),
        ("high_first", c_int32),
    )


class Matmul(Structure):
    _fields_ = (
        ("weight", Matrix),
        ("x", c_void_p),
        ("y", c_void_p),
        ("tokens", c_int64),
        ("rounded", c_int32),
    )


class MixedExpert(Structure):
    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("gate_perm", c_void_p),
        ("up_perm", c_void_p),
        ("down_perm", c_void_p),
        ("share", c_float),
    )


class TokenLayerFields(Structure):
    _fields_ = (
        ("q", Matrix),
        ("k", Matrix),
        ("v", Matrix),
        ("o", Matrix),
        ("perms", c_void_p * 4),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("router", c_void_p),
        ("mixed", c_void_p),
        ("hidden", c_int64),
        ("head_dim", c_int64),
        ("experts", c_int64),
        ("chosen", c_int64),
        ("eps", c_float),
    )


class TokenRoute(Structure):
    _fields_ = (
        ("residual", c_void_p),
        ("normed", c_void_p),
        ("logits", c_void_p),
        ("ids", c_void_p),
        ("shares", c_void_p),
    )


class TokenCache(Structure):
    _fields_ = (("keys", c_void_p), ("values", c_void_p), ("pitch", c_int64))


class TokenStep(Structure):
    _fields_ = (
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("caches", c_void_p),
        ("slot", c_int64),
        ("positions", c_int64),
        ("x", c_void_p),
        ("logits", c_void_p),
    )


class Attended(Structure):
    _fields_ = (
        ("q", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("out", c_void_p),
        ("heads", c_int64),
        ("groups", c_int64),
        ("width", c_int64),
        ("positions", c_int64),
        ("pitch", c_int64),
    )


class DenseMatmul(Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("x", c_void_p),
        ("y", c_void_p),
        ("rows", c_int64),
        ("inputs", c_int64),
        ("tokens", c_int64),
    )


class Packed(Structure):
    _fields_ = (
        ("tiles", c_void_p),
        ("powers", c_void_p),
        ("table", c_void_p),
        ("byte_rows", c_int64),
        ("inputs", c_int64),
        ("tile_inputs", c_int64),
        ("zeros", c_int32),
    )


@dataclass(frozen=True, eq=False)
class TokenLayer:
    """Where the parts of a layer lie that one token passes.

    Attributes:
        outputs: of queries, keys and values together.
        has_experts: whether the experts are among them.
        held: what the pointers point to.
    """

    fields: TokenLayerFields
    outputs: int
    has_experts: bool
    held: tuple[object, ...]

    @classmethod
    def of(
        cls,
        projections: Sequence[NF4 | Int4],
        norms: Sequence[Tensor],
        router: Tensor,
        experts: Sequence[tuple[NF4 | Int4, NF4 | Int4, NF4 | Int4]] | None,
        *,
        eps: float,
        head_dim: int,
        chosen: int,
    ) -> "TokenLayer":
        """Of q, k, v and o; the norms before and after attention [D] and the router's [E, D] in bfloat16.

        Args:
            experts: each one's gate, up and down; None leaves their products to the caller.
        """
        held: list[Tensor] = [*norms, router]
        matrices = [matrix_of(weight, held) for weight in projections]
        perms = (c_void_p * 4)(*(order_of(weight, held) for weight in projections))
        mixed = None
        if experts is not None:
            mixed = (MixedExpert * len(experts))(*(expert_of(expert, held) for expert in experts))
        fields = TokenLayerFields(
            *matrices,
            perms,
            *(norm.data_ptr() for norm in norms),
            router.data_ptr(),
            None if mixed is None else addressof(mixed),
            router.shape[1],
            head_dim,
            router.shape[0],
            chosen,
            eps,
        )
        outputs = sum(weight.shape[0] for weight in projections[:3])
        return cls(fields, outputs, mixed is not None, (*held, mixed))


def expert_of(parts: tuple[NF4 | Int4, NF4 | Int4, NF4 | Int4], held: list[Tensor]) -> MixedExpert:
    """Of gate, up and down; the share is the caller's."""
    perms = (order_of(part, held) for part in parts)
    return MixedExpert(*(matrix_of(part, held) for part in parts), *perms)


def order_of(weight: NF4 | Int4, held: list[Tensor]) -> int | None:
    """Where the order lies that an act-order weight stores its inputs in."""
    if isinstance(weight, NF4) or weight.perm is None:
        return None
    held.append(weight.perm.long().contiguous())
    return held[-1].data_ptr()


def matrix_of(weight: NF4 | Int4, held: list[Tensor]) -> Matrix:
    def pointer(tensor: Tensor) -> int:
        held.append(tensor.contiguous())
        return held[-1].data_ptr()

    rows, inputs = weight.shape
    found = Matrix(codes=pointer(weight.codes), rows=rows, inputs=inputs)
    if isinstance(weight, Int4):
        found.table, found.high_first = (
            pointer(_CODES if weight.zeros is not None else _SYMMETRIC),
            0,
        )
        found.scales, found.scale_kind = pointer(weight.scales), _SCALES[weight.scales.dtype]
        found.block = weight.group_inputs
        if weight.zeros is not None:
            found.zeros = pointer(weight.zeros)
        return found
    found.table, found.high_first, found.block = pointer(weight.table), 1, weight.block_size
    if isinstance(weight.absmax, NestedAbsmax):
        nested = weight.absmax
        found.scales, found.scale_kind = pointer(nested.codes), _NESTED
        found.nested_absmax, found.nested_map = pointer(nested.absmax), pointer(nested.map)
        found.offset = nested.offset
    else:
        found.scales, found.scale_kind = pointer(weight.absmax), _SCALES[weight.absmax.dtype]
    return found
