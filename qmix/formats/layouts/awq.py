"""AWQ's "gemm" layout, 4-bit: the tensors of one weight, read and written.

AutoAWQ 0.2.9 wrote it (awq/modules/linear/gemm.py, awq/utils/packing_utils.py): codes are packed
along the outputs, interleaved. Knows nothing of files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qmix.formats.layouts.checked_tensors import (
    IntegerTensors,
    as_words,
    unpack_words,
    zeros_or_symmetric,
)
from qmix.formats.layouts.tensor_names import QWEIGHT, QZEROS, SCALES
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.affine import Affine, pack_codes, symmetric_zero
from qmix.weights.scheme import Scheme

_BITS = 4
_WORD_CODES = 32 // _BITS
_SLAB_PAIRS = 64  # pairs of inputs
# Output 8c + i lies in nibble _NIBBLES[i] of word c: from its lowest four bits on, the word holds
# the outputs [0 2 4 6 | 1 3 5 7].
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # the inverse: which output each nibble holds


def unpack(
    tensors: Mapping[str, Tensor],
    prefix: str,
    where: str,
    shape: tuple[int, int],
    *,
    zero_point: bool = True,
) -> Affine:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.
        zero_point: what the settings say: if false, every zero is half of the range.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout or the settings say.
    """
    stored = IntegerTensors(tensors, prefix, where, shape)
    rows, columns = shape
    if rows % _WORD_CODES:
        raise stored.wrong(QWEIGHT, "no whole words", "a multiple of 8 outputs", rows)
    qweight = stored.tensor(QWEIGHT, torch.int32, (columns, rows // _WORD_CODES))
    scales = stored.scales(SCALES, 0)
    groups = scales.shape[0]
    qzeros = stored.tensor(QZEROS, torch.int32, (groups, rows // _WORD_CODES))
    zeros = zeros_or_symmetric(_zeros(qzeros), _BITS)
    if zeros is not None and not zero_point:
        half = symmetric_zero(_BITS)
        found = int(zeros[zeros != half][0])
        raise stored.wrong(QZEROS, "zeros, though zero_point of the settings is false", half, found)
    return Affine(codes=_codes(qweight), scales=scales.T.contiguous(), zeros=zeros)


def _codes(qweight: Tensor) -> Tensor:
    """int32 [K, N / 8] -> uint8 [N, K / 2] without unpacking: two inputs' nibbles change places.

    A few inputs at a time, which bounds the memory beside the result.
    """
    columns, words = qweight.shape
    codes = torch.empty(words * _WORD_CODES, columns // 2, dtype=torch.uint8)
    for start in range(0, columns // 2, _SLAB_PAIRS):
        slab = qweight[2 * start : 2 * (start + _SLAB_PAIRS)].contiguous()
        octets = slab.view(torch.uint8).view(len(slab), words, 4)
        even, odd = octets[0::2], octets[1::2]
        halves = (even & 15 | odd << 4, even >> 4 | odd & 0xF0)
        pairs = torch.empty(len(even), words, _WORD_CODES, dtype=torch.uint8)
        for output, nibble in enumerate(_NIBBLES):
            pairs[..., output] = halves[nibble % 2][..., nibble // 2]
        codes[:, start : start + len(even)] = pairs.view(len(even), -1).T
    return codes


def _zeros(qzeros: Tensor) -> Tensor:
    """int32 [G, N / 8] -> uint8 [N, G]."""
    zeros = unpack_words(qzeros, _BITS)[..., _NIBBLES]
    return zeros.reshape(qzeros.shape[0], -1).T.contiguous()


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors that `pack` will return.

    Args:
        shape: (N, K), both multiples of 8; K a multiple of the group size.
        dtype: of the scales.
    """
    rows, columns = shape
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    words = rows // _WORD_CODES
    return (
        TensorSpec(prefix + QWEIGHT, torch.int32, (columns, words)),
        TensorSpec(prefix + QZEROS, torch.int32, (groups, words)),
        TensorSpec(prefix + SCALES, dtype, (groups, rows)),
    )


def pack(weight: Affine, prefix: str) -> dict[str, Tensor]:
    """The tensors of one weight of 4 bits, named and ordered as AutoAWQ saves them.

    Its scales are plain, its zeros codes, its inputs in order, its outputs a multiple of 8.
    """
    assert isinstance(weight.scales, Tensor)
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, symmetric_zero(_BITS), dtype=torch.uint8)
    lanes = zeros.T.reshape(weight.groups, -1, _WORD_CODES)[..., _OUTPUTS]
    return {
        prefix + QWEIGHT: _words(weight.codes),
        prefix + QZEROS: as_words(pack_codes(lanes.flatten(1), _BITS)),
        prefix + SCALES: weight.scales.T.contiguous(),
    }


def _words(codes: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> int32 [K, N / 8]: the inverse of `_codes`."""
    pairs = codes.T.reshape(codes.shape[1], -1, _WORD_CODES)  # (K / 2, N / 8, 8)
    octets = torch.empty(pairs.shape[0], 2, pairs.shape[1], 4, dtype=torch.uint8)
    for byte in range(4):
        low, high = pairs[..., _OUTPUTS[2 * byte]], pairs[..., _OUTPUTS[2 * byte + 1]]
        octets[:, 0, :, byte] = low & 15 | high << 4
        octets[:, 1, :, byte] = low >> 4 | high & 0xF0
    return octets.view(-1, pairs.shape[1] * 4).view(torch.int32)
