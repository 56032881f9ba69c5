"""compressed-tensors' "pack-quantized" layout, 4-bit: the tensors of one weight, read and written.

As compressed-tensors 0.20 (compressors/pack_quantized): codes packed along the inputs, zeros along
the outputs. Shape letters: N outputs, K inputs, G groups. Knows nothing of files or of rounding.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.members import Members, nibbles, zeros_or_symmetric
from qmix.int4 import Int4
from qmix.scheme import Scheme

PACKED = ".weight_packed"
SCALE = ".weight_scale"
SHAPE = ".weight_shape"
ZERO_POINT = ".weight_zero_point"
G_IDX = ".weight_g_idx"

_REQUIRED = (PACKED, SCALE, SHAPE)
_OPTIONAL = (ZERO_POINT, G_IDX)
_WORD_CODES = 8


def check(document: Mapping[str, Any] | None, where: str) -> None:
    """Refuse settings of another layout: config.json's `quantization_config`.

    Args:
        document: None if there is none.
        where: the file, for errors.

    Raises:
        UnsupportedError: another format. CheckpointError: the settings are not compressed-tensors'.
    """
    if document is None:
        return
    if document.get("quant_method") != "compressed-tensors":
        raise CheckpointError(
            "the tensors are compressed-tensors' and quant_method says otherwise",
            where=where,
            expected="'compressed-tensors'",
            found=repr(document.get("quant_method")),
        )
    layout = document.get("format", "pack-quantized")
    if layout != "pack-quantized":
        raise UnsupportedError(
            f"compressed-tensors in the {layout} format is not read",
            where=where,
            expected="pack-quantized",
            found=repr(layout),
            remedy="Quantize the original checkpoint with qmix quantize.",
        )


def members(prefix: str, names: Collection[str]) -> tuple[str, ...]:
    """The tensor names that make up the weight of module `prefix`; none if it is another layout's.

    Those that must be there are among them even if they are not.
    """
    if not any(prefix + suffix in names for suffix in (*_REQUIRED, *_OPTIONAL)):
        return ()
    optional = [suffix for suffix in _OPTIONAL if prefix + suffix in names]
    return tuple(prefix + suffix for suffix in (*_REQUIRED, *optional))


def unpack(tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]) -> Int4:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; others than this module's may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the format says.
        UnsupportedError: other bits than 4, or inputs in another order than their groups.
    """
    read = Members(tensors, prefix, where, shape)
    rows, columns = shape
    stated = read.tensor(SHAPE, torch.int64, (2,)).tolist()
    if stated != list(shape):
        raise read.wrong(SHAPE, "not the shape of the model's weight", list(shape), stated)
    packed = read.tensor(PACKED, torch.int32, None)
    for bits in (2, 3, 5, 6, 7, 8):
        if packed.shape == (rows, -(-columns * bits // 32)) and columns * bits % 32 == 0:
            raise read.unsupported(
                PACKED, "compressed-tensors is read in 4 bits only", 4, f"{bits} bits"
            )
    if columns % _WORD_CODES:
        raise read.wrong(PACKED, "no whole words", "a multiple of 8 inputs", columns)
    packed = read.tensor(PACKED, torch.int32, (rows, columns // _WORD_CODES))
    scales = read.scales(SCALE, 1)
    groups = scales.shape[1]
    zeros = None
    if read.has(ZERO_POINT):
        words = read.tensor(ZERO_POINT, torch.int32, (-(-rows // _WORD_CODES), groups))
        # Both codes and zeros are stored plus 8: the difference is that of the signed integers.
        unpacked = nibbles(words).transpose(1, 2).reshape(-1, groups)[:rows]
        zeros = zeros_or_symmetric(unpacked.contiguous())
    if read.has(G_IDX) and read.permutation(G_IDX, groups) is not None:
        raise read.unsupported(
            G_IDX, "inputs scattered over groups are not read", "input // group size", "act-order"
        )
    return Int4(codes=packed.contiguous().view(torch.uint8), scales=scales, zeros=zeros)


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes that `pack` will give.

    Args:
        shape: (N, K); K a multiple of 8 and of the group size.
        dtype: of the scales.
    """
    rows, columns = shape
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    return {
        prefix + PACKED: (torch.int32, (rows, columns // _WORD_CODES)),
        prefix + SCALE: (dtype, (rows, groups)),
        prefix + SHAPE: (torch.int64, (2,)),
    }


def pack(weight: Int4, prefix: str) -> dict[str, Tensor]:
    """The tensors of one symmetric weight, named as compressed-tensors saves them.

    Raises:
        UnsupportedError: an asymmetric weight (transformers 5.23 cannot load one as experts), or
            inputs scattered over groups.
    """
    if weight.zeros is not None or weight.perm is not None:
        raise UnsupportedError(
            f"module {prefix}: not written as compressed-tensors",
            expected="a symmetric weight with its inputs in order",
            found="zeros" if weight.zeros is not None else "an act-order weight",
            remedy="Quantize symmetrically, without act-order.",
        )
    return {
        prefix + PACKED: weight.codes.view(torch.int32),
        prefix + SCALE: weight.scales,
        prefix + SHAPE: torch.tensor(weight.shape),
    }


def config(scheme: Scheme, *, attention: bool) -> dict[str, object]:
    """config.json's `quantization_config` of what `pack` writes, as transformers 5 and vLLM read it.

    Args:
        attention: whether the attention's matrices are packed too.
    """
    grouped = scheme.group_size != -1
    weights: dict[str, object] = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
    }
    if grouped:
        weights["group_size"] = scheme.group_size
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*gate$"] + ([] if attention else [r"re:.*self_attn\..*"]),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
