"""FP8 weights: E4M3 values times a scale for the weight, for an output, or for a block.

Read as a source: the weight that they stand for, dense in float32. This is what AutoFP8 and vLLM
(`weight_scale`), fbgemm (one scale an output), transformers 5 (`weight_scale_inv` of blocks),
ModelOpt and compressed-tensors' float-quantized write. Knows nothing of files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qmix.formats.layouts.checked_tensors import CheckedTensors
from qmix.formats.layouts.fp4 import check_activation_scales
from qmix.formats.layouts.fp8_blocks import block_size
from qmix.formats.layouts.tensor_names import SCALE, SCALE_INV, WEIGHT
from qmix.quantities import counted
from qmix.weights import float8
from qmix.weights.dense import Dense, all_finite

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


def unpack(tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]) -> Dense:
    """The weight of module `prefix` in float32, after checking each of its tensors.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout says.
    """
    stored = CheckedTensors(tensors, prefix, where)
    weight = stored.tensor(WEIGHT, torch.float8_e4m3fn, shape)
    scales = _scales(stored, shape)
    check_activation_scales(stored)
    blocks = scales.shape[-1]
    size = block_size(shape[1], blocks) if blocks > 1 else shape[1]
    assert size is not None
    values = float8.dequantized(weight, scales, size)
    if not all_finite(values):
        invalid = values.numel() - int(torch.isfinite(values).sum())
        what = "holds NaN, or values beyond the range of float32"
        raise stored.wrong(WEIGHT, what, "finite values", counted(invalid, "other"))
    return Dense(values)


def _scales(stored: CheckedTensors, shape: tuple[int, int]) -> Tensor:
    """The scales, float32: [1] of the weight, or [N, 1] or [N, blocks of a row] of its outputs."""
    suffix = SCALE_INV if stored.has(SCALE_INV) else SCALE
    scales = stored.tensor(suffix)
    if scales.dtype not in _SCALE_DTYPES:
        expected = "float32, bfloat16, float16 or float8_e8m0fnu"
        raise stored.wrong(suffix, "wrong dtype", expected, scales.dtype)
    values = scales.float()
    if invalid := scales.numel() - int(torch.isfinite(values).sum()):
        raise stored.wrong(
            suffix, "holds NaN or infinity", "finite values", counted(invalid, "other")
        )
    if scales.numel() == 1:
        return values.reshape(1)
    rows = shape[0]
    if scales.shape in ((rows,), (rows, 1)):
        return values.reshape(rows, 1)
    sizes = [block_size(*pair) for pair in zip(shape, scales.shape, strict=False)]
    if scales.dim() != 2 or None in sizes:
        expected = f"one scale, [{rows}, 1], or a scale for each block of {list(shape)}"
        raise stored.wrong(suffix, "wrong shape", expected, list(scales.shape))
    size = sizes[0]
    assert size is not None
    return values.repeat_interleave(size, 0)[:rows]
