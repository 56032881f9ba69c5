"""compressed-tensors' "pack-quantized" layout, 4 or 8 bits: a weight's tensors, read and written.

It is that of version 0.20 (compressors/pack_quantized): codes are packed along the inputs, zeros
along the outputs. Knows nothing of files or of rounding.
"""

from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.formats.layouts.checked_tensors import (
    READ_BITS,
    IntegerTensors,
    as_words,
    unpack_words,
    zeros_or_symmetric,
)
from qmix.formats.layouts.module_patterns import expressions
from qmix.formats.layouts.tensor_names import (
    PACKED,
    PACKED_G_IDX,
    SCALE,
    SHAPE,
    WORD_BITS,
    ZERO_POINT,
    compressed_bits,
)
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.affine import Affine
from qmix.weights.scheme import DENSE, Scheme


def unpack(
    tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]
) -> Affine:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout says.
        UnsupportedError: neither 4 nor 8 bits, or inputs that are scattered over groups.
    """
    stored = IntegerTensors(tensors, prefix, where, shape)
    rows, columns = shape
    stored_shape = stored.tensor(SHAPE, torch.int64, (2,)).tolist()
    if stored_shape != list(shape):
        raise stored.wrong(SHAPE, "not the shape of the model's weight", list(shape), stored_shape)
    packed = stored.tensor(PACKED, torch.int32, None)
    bits = compressed_bits(packed.shape[-1], columns) if packed.shape[:1] == (rows,) else None
    if bits is None:
        expected = f"[{rows}, {columns} codes of 4 or 8 bits]"
        raise stored.wrong(PACKED, "wrong shape", expected, list(packed.shape))
    if bits not in READ_BITS:
        what = "compressed-tensors is read in 4 or 8 bits only"
        raise stored.unsupported(PACKED, what, "4 or 8 bits", f"{bits} bits")
    codes_a_word = WORD_BITS // bits
    if columns % codes_a_word:
        raise stored.wrong(
            PACKED, "no whole words", f"a multiple of {codes_a_word} inputs", columns
        )
    packed = stored.tensor(PACKED, torch.int32, (rows, columns // codes_a_word))
    scales = stored.scales(SCALE, 1)
    groups = scales.shape[1]
    zeros = None
    if stored.has(ZERO_POINT):
        words = stored.tensor(ZERO_POINT, torch.int32, (-(-rows // codes_a_word), groups))
        # Codes and zeros are both stored plus half of the range, so their difference is unchanged.
        unpacked = unpack_words(words, bits).transpose(1, 2).reshape(-1, groups)[:rows]
        zeros = zeros_or_symmetric(unpacked.contiguous(), bits)
    if stored.has(PACKED_G_IDX) and stored.permutation(PACKED_G_IDX, groups) is not None:
        raise stored.unsupported(
            PACKED_G_IDX,
            "inputs scattered over groups are not read",
            "input // group size",
            "act-order",
        )
    codes = packed.contiguous().view(torch.uint8)
    return Affine(codes=codes, scales=scales, zeros=zeros, bits=bits)


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors that `pack` will return.

    Args:
        shape: (N, K); K a multiple of 8 (of 4 for 8 bits) and of the group size.
        dtype: of the scales.
    """
    rows, columns = shape
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    return (
        TensorSpec(prefix + PACKED, torch.int32, (rows, columns * scheme.bits // WORD_BITS)),
        TensorSpec(prefix + SCALE, dtype, (rows, groups)),
        TensorSpec(prefix + SHAPE, torch.int64, (2,)),
    )


def pack(weight: Affine, prefix: str) -> dict[str, Tensor]:
    """The tensors of one symmetric weight, named as compressed-tensors saves them.

    Raises:
        UnsupportedError: an asymmetric weight (transformers 5.23 cannot load experts that have
            zeros), or inputs that are scattered over groups.
    """
    scales = weight.scales
    if not weight.symmetric or not isinstance(scales, Tensor) or weight.perm is not None:
        raise UnsupportedError(
            f"module {prefix}: cannot be written as compressed-tensors",
            expected="a symmetric weight with its inputs in order",
            found="an act-order weight" if weight.symmetric else "zeros",
            remedy="Quantize symmetrically, without act-order.",
        )
    return {
        prefix + PACKED: as_words(weight.codes),
        prefix + SCALE: scales,
        prefix + SHAPE: torch.tensor(weight.shape),
    }


def quantization_config(schemes: Mapping[str, Scheme]) -> dict[str, object]:
    """config.json's `quantization_config` for what `pack` writes; transformers 5 and vLLM read it.

    The most frequent scheme is the group of all linear layers. The modules of each other scheme are
    the targets of a group of their own, because readers prefer names to classes. transformers 5.23
    unpacks all experts by the first group that names any. If the experts' schemes differ, every
    group therefore names its modules, 8 bits first: transformers then fails on 4 bits instead of
    loading noise.

    Args:
        schemes: of every linear layer by its module's name, dense ones included; at least one is
            of integers, symmetric, and none belongs to another layout.
    """
    counts = Counter(scheme for scheme in schemes.values() if scheme.integer)
    ordered = [scheme for scheme, _ in counts.most_common()]
    expert_schemes = {
        scheme for module, scheme in schemes.items() if ".experts." in module and scheme.integer
    }
    if len(expert_schemes) > 1:
        ordered.sort(key=lambda scheme: -scheme.bits)
    groups = {}
    for index, scheme in enumerate(ordered):
        modules = [module for module, other in schemes.items() if other == scheme]
        by_name = index > 0 or len(expert_schemes) > 1
        targets = _expressions(modules, schemes) if by_name else ["Linear"]
        groups[f"group_{index}"] = {"targets": targets, "weights": _weights(scheme)}
    dense = [module for module, scheme in schemes.items() if scheme == DENSE]
    heads = ["lm_head"] if "lm_head" in dense else []
    routers = [r"re:.*gate$"] if any(module.endswith(".gate") for module in dense) else []
    others = [module for module in dense if module != "lm_head" and not module.endswith(".gate")]
    return {
        "config_groups": groups,
        "format": "pack-quantized",
        "ignore": heads + routers + _expressions(others, schemes),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _expressions(modules: Collection[str], every: Collection[str]) -> list[str]:
    return [f"re:{pattern}" for pattern in expressions(modules, every)]


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
