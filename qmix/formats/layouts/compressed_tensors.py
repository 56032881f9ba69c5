"""compressed-tensors' "pack-quantized" layout, 4 or 8 bits: the tensors of one weight, read and written.

As compressed-tensors 0.20 (compressors/pack_quantized): codes packed along the inputs, zeros along
the outputs. Shape letters: N outputs, K inputs, G groups. Knows nothing of files or of rounding.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.formats.layouts.checked_tensors import (
    TYPES,
    CheckedTensors,
    unpack_words,
    zeros_or_symmetric,
)
from qmix.formats.layouts.module_patterns import patterns
from qmix.formats.layouts.tensor_names import (
    PACKED,
    PACKED_G_IDX,
    SCALE,
    SHAPE,
    WORD_BITS,
    ZERO_POINT,
    compressed_bits,
)
from qmix.weights.integers import Integers
from qmix.weights.scheme import DENSE, Scheme


def unpack(
    tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]
) -> Integers:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; others than this module's may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the format says.
        UnsupportedError: other bits than 4 and 8, or inputs in another order than their groups.
    """
    read = CheckedTensors(tensors, prefix, where, shape)
    rows, columns = shape
    stated = read.tensor(SHAPE, torch.int64, (2,)).tolist()
    if stated != list(shape):
        raise read.wrong(SHAPE, "not the shape of the model's weight", list(shape), stated)
    packed = read.tensor(PACKED, torch.int32, None)
    bits = compressed_bits(packed.shape[-1], columns) if packed.shape[:1] == (rows,) else None
    if bits is None:
        expected = f"[{rows}, {columns} codes of 4 or 8 bits]"
        raise read.wrong(PACKED, "wrong shape", expected, list(packed.shape))
    if bits not in TYPES:
        what = "compressed-tensors is read in 4 or 8 bits only"
        raise read.unsupported(PACKED, what, "4 or 8 bits", f"{bits} bits")
    codes_a_word = WORD_BITS // bits
    if columns % codes_a_word:
        raise read.wrong(PACKED, "no whole words", f"a multiple of {codes_a_word} inputs", columns)
    packed = read.tensor(PACKED, torch.int32, (rows, columns // codes_a_word))
    scales = read.scales(SCALE, 1)
    groups = scales.shape[1]
    zeros = None
    if read.has(ZERO_POINT):
        words = read.tensor(ZERO_POINT, torch.int32, (-(-rows // codes_a_word), groups))
        # Both codes and zeros are stored plus half of the range: the difference is that of the signed integers.
        unpacked = unpack_words(words, bits).transpose(1, 2).reshape(-1, groups)[:rows]
        zeros = zeros_or_symmetric(unpacked.contiguous(), bits)
    if read.has(PACKED_G_IDX) and read.permutation(PACKED_G_IDX, groups) is not None:
        raise read.unsupported(
            PACKED_G_IDX,
            "inputs scattered over groups are not read",
            "input // group size",
            "act-order",
        )
    return TYPES[bits](codes=packed.contiguous().view(torch.uint8), scales=scales, zeros=zeros)


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes that `pack` will give.

    Args:
        shape: (N, K); K a multiple of 8 (of 4 for 8 bits) and of the group size.
        dtype: of the scales.
    """
    rows, columns = shape
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    return {
        prefix + PACKED: (torch.int32, (rows, columns * scheme.bits // WORD_BITS)),
        prefix + SCALE: (dtype, (rows, groups)),
        prefix + SHAPE: (torch.int64, (2,)),
    }


def pack(weight: Integers, prefix: str) -> dict[str, Tensor]:
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


def config(schemes: Mapping[str, Scheme]) -> dict[str, object]:
    """config.json's `quantization_config` of what `pack` writes, as transformers 5 and vLLM read it.

    The most frequent scheme is the group of all linear layers; the modules of each other are the
    targets of a group of their own: names are preferred to classes there. transformers 5.23 unpacks
    all experts by the first group that names some. So where their schemes differ every group names
    its modules, 8 bits first: then it fails on 4 bits, and does not load noise.

    Args:
        schemes: of every linear layer by its module's name, dense ones included; at least one is
            of integers, symmetric, none of another layout.
    """
    counts = Counter(scheme for scheme in schemes.values() if scheme.integer)
    ordered = [scheme for scheme, _ in counts.most_common()]
    of_experts = {own for module, own in schemes.items() if ".experts." in module and own.integer}
    if len(of_experts) > 1:
        ordered.sort(key=lambda scheme: -scheme.bits)
    groups = {}
    for index, scheme in enumerate(ordered):
        own = [module for module, other in schemes.items() if other == scheme]
        named = index > 0 or len(of_experts) > 1
        targets = [f"re:{pattern}" for pattern in patterns(own, schemes)] if named else ["Linear"]
        groups[f"group_{index}"] = {"targets": targets, "weights": _weights(scheme)}
    dense = [module for module, scheme in schemes.items() if scheme == DENSE]
    heads = ["lm_head"] if "lm_head" in dense else []
    routers = [r"re:.*gate$"] if any(module.endswith(".gate") for module in dense) else []
    others = [module for module in dense if module != "lm_head" and not module.endswith(".gate")]
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "ignore": heads + routers + [f"re:{pattern}" for pattern in patterns(others, schemes)],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _weights(scheme: Scheme) -> dict[str, object]:
    grouped = scheme.group_size != -1
    size = {"group_size": scheme.group_size} if grouped else {}
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        **size,
    }
