"""AWQ's "gemm" layout, 4-bit: the tensors of one weight, read.

AutoAWQ 0.2.9 wrote it (awq/modules/linear/gemm.py, awq/utils/packing_utils.py): codes are packed
along the outputs, interleaved. Knows nothing of files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qmix.formats.layouts.checked_tensors import IntegerTensors, unpack_words, zeros_or_symmetric
from qmix.formats.layouts.tensor_names import QWEIGHT, QZEROS, SCALES
from qmix.weights.affine import Affine, symmetric_zero

_BITS = 4
_WORD_CODES = 32 // _BITS
# Output 8c + i lies in nibble _NIBBLES[i] of word c: from its lowest four bits on, the word holds
# the outputs [0 2 4 6 | 1 3 5 7].
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)


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
    """int32 [K, N / 8] -> uint8 [N, K / 2] without unpacking: two inputs' nibbles change places."""
    octets = qweight.contiguous().view(torch.uint8).view(qweight.shape[0], -1, 4)
    even, odd = octets[0::2], octets[1::2]  # (K / 2, N / 8, 4)
    halves = (even & 15 | odd << 4, even >> 4 | odd & 0xF0)
    pairs = torch.empty(even.shape[0], even.shape[1], _WORD_CODES, dtype=torch.uint8)
    for output, nibble in enumerate(_NIBBLES):
        pairs[..., output] = halves[nibble % 2][..., nibble // 2]
    return pairs.view(even.shape[0], -1).T.contiguous()


def _zeros(qzeros: Tensor) -> Tensor:
    """int32 [G, N / 8] -> uint8 [N, G]."""
    zeros = unpack_words(qzeros, _BITS)[..., _NIBBLES]
    return zeros.reshape(qzeros.shape[0], -1).T.contiguous()
