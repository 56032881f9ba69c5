"""NVFP4 and MXFP4: a weight's tensors in the layouts of ModelOpt and of compressed-tensors, read.

Codes are E2M1, two in a byte with the first in the low bits, and lie along the inputs. A scale is
for 16 inputs in E4M3 (NVFP4) or for 32 in E8M0 (MXFP4); NVFP4 has one float32 for the whole weight
besides, which multiplies in ModelOpt 0.47 (torch/quantization/qtensor/nvfp4_tensor.py) and divides
in compressed-tensors 0.20 (compressors/nvfp4, quantization/lifecycle/forward_helpers.py). The order
of the float32 operations is theirs, so that the values are equal to the bit; minus zero is zero.
Knows nothing of files.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.formats.layouts.checked_tensors import CheckedTensors
from qmix.formats.layouts.tensor_names import (
    ACTIVATION_SCALES,
    GLOBAL_SCALE,
    PACKED,
    SCALE,
    SCALE_2,
    WEIGHT,
)
from qmix.quantities import counted
from qmix.weights.scales import NestedScales
from qmix.weights.table import E2M1_VALUES, Table

NVFP4_BLOCK = 16
MXFP4_BLOCK = 32
_LARGEST_CODE = 6.0
_MINUS_ZERO = 128  # in E4M3; larger codes are negative
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
# The tensors do not say the dtype of the weight before; both tools unpack to this one.
_DTYPE = torch.bfloat16


def unpack_modelopt(
    tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]
) -> Table:
    """The weight of module `prefix` in ModelOpt's NVFP4, after checking each of its tensors.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout says.
    """
    stored = CheckedTensors(tensors, prefix, where)
    factor = positive(stored, SCALE_2)
    return _table(stored, WEIGHT, shape, e4m3(), factor)


def unpack_compressed(
    tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]
) -> Table:
    """The same of compressed-tensors' NVFP4 and MXFP4."""
    stored = CheckedTensors(tensors, prefix, where)
    if stored.tensor(SCALE).dtype in _EXPONENTS:
        return _table(stored, PACKED, shape, e8m0(), torch.ones(1))
    divisor = positive(stored, GLOBAL_SCALE)
    # A quotient is rounded; multiplied by one it is what compressed-tensors computes.
    return _table(stored, PACKED, shape, e4m3() / divisor, torch.ones(1))


def positive(stored: CheckedTensors, suffix: str) -> Tensor:
    """A tensor of one number that must be finite and above zero: float32 [1].

    Raises:
        CheckpointError: it is missing, or is something else.
    """
    tensor = stored.tensor(suffix)
    if not tensor.dtype.is_floating_point or tensor.itemsize == 1:
        expected = "float32, bfloat16 or float16"
        raise stored.wrong(suffix, "wrong dtype", expected, tensor.dtype)
    if tensor.numel() != 1:
        raise stored.wrong(suffix, "wrong shape", "one number", list(tensor.shape))
    value = tensor.reshape(1).float()
    if not 0 < float(value) < math.inf:
        raise stored.wrong(suffix, "wrong value", "a finite number above 0", float(value))
    return value


def check_activation_scales(stored: CheckedTensors) -> None:
    """Check the scales of activations, which are not used.

    Raises:
        CheckpointError: one is not a finite number above zero.
    """
    for suffix in ACTIVATION_SCALES:
        if stored.has(suffix):
            positive(stored, suffix)


def _table(
    stored: CheckedTensors, codes: str, shape: tuple[int, int], values: Tensor, outer: Tensor
) -> Table:
    """Check codes and scales, and put them together.

    Args:
        codes: the suffix of the codes' tensor.
        values: of the scales' 256 codes, float32; NaN or infinity is refused where it is used.
        outer: float32 [1], multiplies all scales.
    """
    rows, columns = shape
    dtype = stored.tensor(SCALE).dtype
    if dtype not in (torch.float8_e4m3fn, *_EXPONENTS):
        raise stored.wrong(SCALE, "wrong dtype", "float8_e4m3fn, or uint8 in MXFP4", dtype)
    block = NVFP4_BLOCK if dtype == torch.float8_e4m3fn else MXFP4_BLOCK
    if columns % block:
        raise stored.wrong(codes, "no whole blocks", f"a multiple of {block} inputs", columns)
    packed = stored.tensor(codes, torch.uint8, (rows, columns // 2))
    scales = stored.tensor(SCALE, None, (rows, columns // block))
    if dtype == torch.float8_e4m3fn and bool((scales.view(torch.uint8) > _MINUS_ZERO).any()):
        _refuse_mixfp4(stored)
    check_activation_scales(stored)
    return e2m1_table(stored, SCALE, packed, scales.view(torch.uint8), shape, values, outer)


def _refuse_mixfp4(stored: CheckedTensors) -> None:
    """Refuse MixFP4, whose tensors are NVFP4's: a negative scale says what its codes mean."""
    raise UnsupportedError(
        f"tensor {stored.prefix}{SCALE}: MixFP4 checkpoints are not read",
        where=stored.where,
        expected="scales of 0 or more, as in NVFP4",
        found="negative scales",
        remedy="Fetch the NVFP4 checkpoint of the same model.",
    )


def e2m1_table(
    stored: CheckedTensors,
    suffix: str,
    packed: Tensor,
    scale_codes: Tensor,
    shape: tuple[int, int],
    values: Tensor,
    outer: Tensor,
) -> Table:
    """A weight of E2M1 codes, after checking that its scales are finite.

    Args:
        suffix: of the scales' tensor, for errors.
        packed: uint8 [N, K / 2], the first input of a byte in the low bits.
        scale_codes: uint8 [N, G].
        shape: (N, K).
        values: of the scales' 256 codes, float32; NaN or infinity is refused where it is used.
        outer: float32 [1], multiplies all scales.

    Raises:
        CheckpointError: a scale is not finite, or makes a value that is not.
    """
    found = torch.bincount(scale_codes.flatten(), minlength=256)
    invalid = (found > 0) & ~torch.isfinite(values * outer * _LARGEST_CODE)
    if bool(invalid.any()):
        what = "holds NaN, or scales beyond the range of float32"
        raise stored.wrong(
            suffix, what, "finite values", counted(int(found[invalid].sum()), "other")
        )
    return Table(
        codes=packed.view(-1),
        scales=NestedScales(
            codes=scale_codes,
            outer=outer,
            map=torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0),
            block=max(1, scale_codes.numel()),
        ),
        table=_e2m1(),
        out_shape=shape,
        out_dtype=_DTYPE,
        block_size=shape[1] // scale_codes.shape[1],
        kind="e2m1",
        high_first=False,
    )


def _e2m1() -> Tensor:
    return torch.tensor(E2M1_VALUES)


def e4m3() -> Tensor:
    """The value of each E4M3 code, float32 [256]; codes 127 and 255 are NaN."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def e8m0() -> Tensor:
    """The value of each E8M0 code, 2^(code - 127), float32 [256]; code 255 is NaN."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
