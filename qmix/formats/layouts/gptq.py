"""GPTQ's layout, 2, 3, 4 or 8 bits: the tensors of one weight, read and written.

AutoGPTQ wrote it from 2023 on ("gptq", v1), gptqmodel 7.7 writes "gptq_v2", AutoRound both; v1
stores each zero minus one. Codes fill 32-bit words as one stream of bits: 32 of 3 bits take three
words. Knows nothing of files or of rounding.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.formats.layouts.checked_tensors import (
    IntegerTensors,
    as_words,
    unpack_words,
    zeros_or_symmetric,
)
from qmix.formats.layouts.gptq_config import ModuleSettings
from qmix.formats.layouts.tensor_names import (
    BIAS,
    G_IDX,
    QWEIGHT,
    QZEROS,
    SCALES,
    WORD_BITS,
    gptq_bits,
)
from qmix.formats.tensor_spec import TensorSpec
from qmix.quantities import counted
from qmix.weights.affine import (
    Affine,
    pack_codes,
    reorder_codes,
    symmetric_zero,
    unpack_codes,
)
from qmix.weights.scheme import Scheme


def unpack(
    tensors: Mapping[str, Tensor],
    prefix: str,
    where: str,
    shape: tuple[int, int],
    settings: ModuleSettings,
) -> Affine:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.
        settings: what the settings say of this module.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout or the settings say.
        UnsupportedError: a number of bits that is not read.
    """
    stored = IntegerTensors(tensors, prefix, where, shape)
    rows, columns = shape
    if stored.has(G_IDX) or not settings.auto_round:
        stored.tensor(G_IDX, torch.int32, (columns,))  # before the bits, which follow from K
    bits = _bits(stored, settings)
    whole = _whole(bits)
    if columns % whole or rows % whole:
        expected = f"multiples of {whole}"
        raise stored.wrong(QWEIGHT, "no whole words", expected, f"weight {list(shape)}")
    qweight = stored.tensor(QWEIGHT, torch.int32, (columns * bits // WORD_BITS, rows))
    scales = stored.scales(SCALES, 0)
    groups = scales.shape[0]
    if settings.group_size is not None:
        size = columns if settings.group_size == -1 else settings.group_size
        if size * groups != columns:
            raise stored.wrong(
                SCALES,
                f"not the group size of {settings.source}",
                f"groups of {counted(size, 'input')}",
                f"{counted(groups, 'group')} of {counted(columns, 'input')}",
            )
    zeros = _zeros(stored, bits, groups, settings)
    if stored.has(BIAS):
        # AutoGPTQ wrote biases for layers that have none: they are zero.
        bias = stored.tensor(BIAS, scales.dtype, (rows,))
        if bool((bias != 0).any()):
            raise stored.wrong(BIAS, "a Mixtral has no biases", "zeros", bias.abs().max().item())
    perm = stored.permutation(G_IDX, groups) if stored.has(G_IDX) else None
    if perm is not None and settings.act_order is False:
        raise stored.wrong(
            G_IDX,
            f"inputs are scattered over groups (desc_act of {settings.source} is false)",
            f"input // {columns // groups}",
            f"another group from input {_first_scattered(stored, columns // groups)} on",
        )
    codes = qweight.T.contiguous().view(torch.uint8)
    if perm is not None:
        codes = reorder_codes(codes, perm, bits)
    return Affine(codes, scales.T.contiguous(), zeros, perm, bits)


def _whole(bits: int) -> int:
    """The fewest codes that fill whole words."""
    return WORD_BITS // math.gcd(WORD_BITS, bits)


def _first_scattered(stored: IntegerTensors, size: int) -> int:
    """The first input that does not belong to the group of its `size` neighbours."""
    index = stored.tensor(G_IDX)
    return int((index != torch.arange(len(index), device=index.device) // size).nonzero()[0])


def _bits(stored: IntegerTensors, settings: ModuleSettings) -> int:
    """Bits of a code, from the tensors; the settings must confirm it."""
    rows, columns = stored.shape
    qweight = stored.tensor(QWEIGHT, torch.int32, None)
    bits = gptq_bits(qweight.shape[0], columns) if qweight.shape[1:] == (rows,) else None
    if bits is None:
        expected = [columns * (settings.bits or 4) // WORD_BITS, rows]
        raise stored.wrong(QWEIGHT, "wrong shape", expected, list(qweight.shape))
    if settings.rule is not None and settings.rule.excluded:
        raise stored.wrong(
            QWEIGHT,
            f"{settings.source} says that the module is not quantized",
            "its .weight alone",
            f"{bits} bits",
        )
    if settings.bits not in (None, bits):
        what = f"not the bits of {settings.source}"
        raise stored.wrong(QWEIGHT, what, f"{settings.bits} bits", f"{bits} bits")
    return bits


def _zeros(
    stored: IntegerTensors, bits: int, groups: int, settings: ModuleSettings
) -> Tensor | None:
    """uint8 [N, G]; None if all zeros are symmetric, which the settings must confirm."""
    rows = stored.shape[0]
    words = stored.tensor(QZEROS, torch.int32, (groups, rows * bits // WORD_BITS))
    codes = unpack_codes(words.contiguous().view(torch.uint8), bits)
    if settings.version == 1:
        if settings.auto_round and bool((codes == (1 << bits) - 1).any()):
            # AutoRound reads it as a zero of 2^bits, all others as 0.
            largest = (1 << bits) - 2
            raise stored.wrong(
                QZEROS, "AutoRound stores no such zero", f"0 to {largest}", largest + 1
            )
        codes = _plus_one(words, codes, bits)
    zeros = codes.T.contiguous()
    if not settings.symmetric:
        return zeros_or_symmetric(zeros, bits)
    asymmetric = zeros[zeros != symmetric_zero(bits)]
    if asymmetric.numel():
        less = 1 if settings.version == 1 else 0
        raise stored.wrong(
            QZEROS,
            f"not the zeros of a symmetric weight (sym of {settings.source})",
            f"{symmetric_zero(bits) - less} in every {bits} bits (version {settings.version})",
            int(asymmetric[0]) - less,
            remedy="Correct checkpoint_format (gptq or gptq_v2) or sym there.",
        )
    return None


def _plus_one(words: Tensor, codes: Tensor, bits: int) -> Tensor:
    """The zeros, uint8 [G, N], of codes that v1 stores minus one.

    One is added to all codes of a word at once, as in gptqmodel: a zero of 0 was stored by
    borrowing from the next. Codes of 3 bits straddle words, and it adds to each by itself.
    """
    if WORD_BITS % bits:
        return codes + 1 & (1 << bits) - 1
    sums = words.long() + sum(1 << shift for shift in range(0, WORD_BITS, bits))
    return unpack_words(sums & 0xFFFFFFFF, bits).reshape(codes.shape)


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors that `pack` will return.

    Args:
        shape: (N, K), both of whole words (8 codes of 4 bits); K a multiple of the group size.
        dtype: of the scales.

    Raises:
        UnsupportedError: outputs or inputs that do not fill whole words or groups.
    """
    rows, columns = shape
    bits, whole = scheme.bits, _whole(scheme.bits)
    group_size = columns if scheme.group_size == -1 else scheme.group_size
    if rows % whole or columns % whole or columns % group_size:
        raise UnsupportedError(
            f"module {prefix}: cannot be written as GPTQ",
            expected=f"multiples of {whole} outputs and inputs, whole groups of inputs",
            found=f"{rows} and {columns} in {scheme}",
            remedy="Leave it dense, or choose another group size.",
        )
    groups = columns // group_size
    return (
        TensorSpec(prefix + QWEIGHT, torch.int32, (columns * bits // WORD_BITS, rows)),
        TensorSpec(prefix + QZEROS, torch.int32, (groups, rows * bits // WORD_BITS)),
        TensorSpec(prefix + SCALES, dtype, (groups, rows)),
        TensorSpec(prefix + G_IDX, torch.int32, (columns,)),
    )


def version_of(weight: Affine) -> int:
    """The version that stores a weight: 1, or 2 if a zero is 0, on which v1 readers disagree."""
    return 2 if weight.zeros is not None and bool((weight.zeros == 0).any()) else 1


def pack(weight: Affine, prefix: str, version: int = 1) -> dict[str, Tensor]:
    """The tensors of one weight of whole words, named and ordered as AutoGPTQ saves them.

    Raises:
        UnsupportedError: a zero of 0 in v1.
    """
    scales = weight.scales
    is_code = weight.zeros is None or weight.zeros.dtype == torch.uint8
    if not isinstance(scales, Tensor) or weight.biases is not None or not is_code:
        raise UnsupportedError(
            f"module {prefix}: cannot be written as GPTQ",
            expected="plain scales, and zeros that are codes",
            found=str(weight.scheme),
            remedy="Quantize the original checkpoint with qmix quantize.",
        )
    rows, columns = weight.shape
    bits, groups = weight.bits, weight.groups
    codes, index = weight.codes, torch.arange(columns, dtype=torch.int32) // weight.group_inputs
    if weight.perm is not None:
        inverse = torch.argsort(weight.perm)
        codes, index = reorder_codes(codes, inverse, bits), index[inverse]
    if weight.zeros is None:
        zeros = torch.full((groups, rows), symmetric_zero(bits), dtype=torch.uint8)
    else:
        zeros = weight.zeros.T
        if version == 1 and version_of(weight) != 1:
            raise UnsupportedError(
                f"module {prefix}: GPTQ v1 cannot store a zero of 0",
                expected=f"zeros of 1 to {(1 << bits) - 1}",
                found=0,
                remedy="Quantize symmetrically, or with zeros of 1 or more.",
            )
    if version == 1:
        zeros = zeros - 1
    return {
        prefix + QWEIGHT: as_words(codes).T.contiguous(),
        prefix + QZEROS: as_words(pack_codes(zeros.contiguous(), bits)),
        prefix + SCALES: scales.T.contiguous(),
        prefix + G_IDX: index,
    }
