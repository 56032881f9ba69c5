"""The same affine weight in another form: other scales, zeros, biases, groups or bits.

Each function returns a weight of the same values, bit for bit in float32, or says what stands in
the way. Scales of 16 bits times a code are exact in float32, so `(code - zero) * scale` and
`code * scale + bias` give the same number there. Shape letters: see qmix.weights.affine.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qmix.weights import scales as scale_values
from qmix.weights.affine import Affine, pack_codes, reorder_codes, symmetric_zero, unpack_codes
from qmix.weights.scales import NestedScales, Scales

HALVES = (torch.float16, torch.bfloat16)


class InexactError(Exception):
    """A weight has no such form without rounding; the text names what would be lost."""


def in_order(weight: Affine) -> Affine:
    """The weight with its inputs in the layer's order.

    Raises:
        InexactError: the inputs of a group are no neighbours.
    """
    if weight.perm is None:
        return weight
    if weight.groups > 1:
        raise InexactError("act-order")
    codes = reorder_codes(weight.codes, torch.argsort(weight.perm), weight.bits)
    return replace(weight, codes=codes, perm=None)


def in_groups(weight: Affine, sizes: Sequence[int]) -> Affine:
    """The weight in groups of one of `sizes`, the first that fits; scales are repeated.

    Raises:
        InexactError: none divides the weight's groups, or the scales are nested.
    """
    size = weight.group_inputs
    found = size if size in sizes else next((other for other in sizes if size % other == 0), None)
    if found is None:
        raise InexactError(f"groups of {size} inputs")
    if found == size:
        return weight
    if any(isinstance(part, NestedScales) for part in (weight.scales, weight.biases)):
        raise InexactError("nested scales")
    repeated = [
        part.repeat_interleave(size // found, 1) if isinstance(part, Tensor) else None
        for part in (weight.scales, weight.zeros, weight.biases)
    ]
    scales, zeros, biases = repeated
    assert scales is not None
    return replace(weight, scales=scales, zeros=zeros, biases=biases)


def in_bits(weight: Affine, bits: int) -> Affine:
    """The weight in wider codes.

    Raises:
        InexactError: they would be narrower.
    """
    if bits == weight.bits:
        return weight
    if bits < weight.bits:
        raise InexactError(f"codes of {weight.bits} bits")
    codes = unpack_codes(weight.codes, weight.bits)
    if weight.symmetric:
        codes = codes + (symmetric_zero(bits) - symmetric_zero(weight.bits))
    return replace(weight, codes=pack_codes(codes, bits), bits=bits)


def with_plain_scales(
    weight: Affine, dtypes: Sequence[torch.dtype] = HALVES, *, exact: bool = True
) -> Affine:
    """The weight with plain scales of the first of `dtypes` that holds them; biases stay.

    Args:
        exact: False rounds them to the first dtype where none holds them.

    Raises:
        InexactError: none holds them.
    """
    scales = weight.scales
    if isinstance(scales, Tensor) and scales.dtype in dtypes:
        return weight
    values = _floats(weight, scales)
    found = _narrowed((values,), dtypes, exact=exact)
    if found is None:
        nested = isinstance(scales, NestedScales)
        raise InexactError("nested scales" if nested else f"scales beyond {_names(dtypes)}")
    return replace(weight, scales=values.to(found), out_dtype=found)


def with_zeros(weight: Affine) -> Affine:
    """A weight with plain scales of 16 bits, whose zeros are codes, or symmetric.

    Raises:
        InexactError: zeros that are no codes, or biases that are no code times the scale.
    """
    if weight.biases is None and (weight.zeros is None or weight.zeros.dtype == torch.uint8):
        return weight
    half, last = symmetric_zero(weight.bits), (1 << weight.bits) - 1
    if weight.zeros is not None:
        zeros, lost = weight.zeros.double(), "zeros that are no codes"
        exact = zeros == zeros.round()
    else:
        assert weight.biases is not None
        lost = "free biases"
        if not isinstance(weight.scales, Tensor) or weight.scales.dtype not in HALVES:
            raise InexactError(lost)
        scales, biases = weight.scales.double(), _floats(weight, weight.biases).double()
        zeros = torch.where(scales == 0, half, -biases / scales).round()
        exact = zeros * scales == -biases
    if not bool((exact & (zeros >= 0) & (zeros <= last)).all()):
        raise InexactError(lost)
    symmetric = bool((zeros == half).all())
    return replace(weight, zeros=None if symmetric else zeros.to(torch.uint8), biases=None)


def with_biases(
    weight: Affine, dtypes: Sequence[torch.dtype] = HALVES, *, exact: bool = True
) -> Affine:
    """The weight with scales and biases of the first of `dtypes` that holds both.

    Args:
        exact: False rounds them to the first dtype where none holds them.

    Raises:
        InexactError: none holds them.
    """
    if exact and weight.zeros is not None:
        weight = with_zeros(weight)
    scales = _floats(weight, weight.scales)
    if weight.biases is not None:
        biases, lost = _floats(weight, weight.biases).double(), "nested scales or biases"
    else:
        zeros = symmetric_zero(weight.bits) if weight.zeros is None else weight.zeros.double()
        biases, lost = -zeros * scales.double(), "zeros"
        if isinstance(weight.scales, NestedScales):
            lost = "nested scales"
    if isinstance(weight.scales, Tensor):
        dtypes = sorted(dtypes, key=lambda dtype: dtype != weight.dtype)
    found = _narrowed((scales, biases), dtypes, exact=exact)
    if found is None:
        raise InexactError(f"{lost} that {_names(dtypes)} does not hold")
    return replace(
        weight, scales=scales.to(found), zeros=None, biases=biases.to(found), out_dtype=found
    )


def _floats(weight: Affine, scales: Scales) -> Tensor:
    """float32 [N, G]."""
    rows, groups = weight.shape[0], weight.groups
    return scale_values.floats(scales, 0, rows * groups).view(rows, groups)


def _narrowed(
    values: Sequence[Tensor], dtypes: Sequence[torch.dtype], *, exact: bool
) -> torch.dtype | None:
    """The first dtype that holds all values; without `exact`, else the first that is finite."""
    for dtype in dtypes:
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in values):
            return dtype
    if exact:
        return None
    finite = (t for t in dtypes if all(bool(torch.isfinite(v.to(t)).all()) for v in values))
    return next(finite, None)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
