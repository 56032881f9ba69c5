"""GGUF's types of 1 to 3 bits whose codes come from grids: IQ1_S, IQ1_M, IQ2 and IQ3.

A number stands for 4 or 8 neighbouring weights. What they can be, signs included, are at most 16
values, so such a weight is one of a table in 4 bits: exact, and larger than its file. The values
are llama.cpp's (gguf 0.19, quants.py), bit for bit in float32. Shape letters: see
qmix.formats.layouts.gguf.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from qmix.formats.layouts import gguf_grids
from qmix.formats.layouts.gguf_fields import (
    Blocks,
    Bytes,
    fields_of,
    halves_of,
    six_bits,
    table_weight,
)
from qmix.weights.scales import NestedScales
from qmix.weights.table import Table

Words = NDArray[np.integer]

_CODES = torch.arange(64, dtype=torch.float32)
_QUARTERS = (_CODES + 0.5) / 4
_HALVES = (_CODES + 0.5) / 2
_ODD = 2 * _CODES + 1
_ODD_EIGHTHS = _ODD / 8
_DELTA_BELOW = 3  # what an offset of -1/8 instead of 1/8 adds to a code of IQ1
_SIGN_BITS = (np.arange(256, dtype=np.uint32)[:, None] >> np.arange(8, dtype=np.uint32)) & 1
# Of a byte of signs: the signs of eight codes, four bits each.
_SIGNS = (_SIGN_BITS << np.arange(3, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32)
# Seven bits of signs, whose eighth makes their number even.
_SEVEN = np.arange(128, dtype=np.uint32) | (_SIGN_BITS[:128].sum(-1) & 1) << 7


def _words(blocks: Blocks, start: int, stop: int, dtype: type[np.unsignedinteger]) -> Words:
    """Bytes [start, stop) of each block as words, [N, b, n]."""
    words: Words = np.ascontiguousarray(blocks.field(start, stop)).view(dtype)
    return words


def _bytes(codes: NDArray[np.uint32]) -> Bytes:
    """Eight codes a word, [N, ...], as a weight holds them: uint8 [N, K / 2]."""
    return np.ascontiguousarray(codes.reshape(len(codes), -1)).view(np.uint8)


def _of_four(name: str, index: Words) -> NDArray[np.uint32]:
    """Eight magnitudes a word, of a grid of four: [N, b, n] -> uint32 [N, b, n / 2]."""
    rows = np.take(gguf_grids.rows(name), index)
    return rows[..., 0::2] | rows[..., 1::2] << np.uint32(16)


def _iq2_xxs(blocks: Blocks) -> Table:
    scale = _words(blocks, 2, 66, np.uint32)[..., 1::2] >> 28
    scales = _scales(scale, blocks, 0, _QUARTERS)
    return table_weight(blocks, _iq2_xxs_codes, scales, "iq2")


def _iq2_xxs_codes(blocks: Blocks) -> Bytes:
    rows, count, _ = blocks.data.shape
    index = blocks.field(2, 66).reshape(rows, count, 8, 8)[..., :4]
    signs = _seven_signs(_words(blocks, 2, 66, np.uint32)[..., 1::2])
    return _bytes(np.take(gguf_grids.rows("IQ2_XXS"), index) | signs)


def _seven_signs(words: Words) -> NDArray[np.uint32]:
    """The signs of 32 codes in the lower 28 bits of a word: uint32 [..., 4]."""
    seven = words[..., None] >> np.arange(0, 28, 7, dtype=np.uint32) & 127
    signs: NDArray[np.uint32] = np.take(_SIGNS[_SEVEN], seven)
    return signs


def _iq2_xs(blocks: Blocks) -> Table:
    scales = _scales(halves_of(blocks.field(66, 74)), blocks, 0, _QUARTERS)
    return table_weight(blocks, _iq2_xs_codes, scales, "iq2", 16)


def _iq2_xs_codes(blocks: Blocks) -> Bytes:
    words = _words(blocks, 2, 66, np.uint16)
    magnitudes = np.take(gguf_grids.rows("IQ2_XS"), words & 511)
    return _bytes(magnitudes | np.take(_SIGNS[_SEVEN], words >> 9))


def _iq2_s(blocks: Blocks) -> Table:
    scales = _scales(halves_of(blocks.field(74, 82)), blocks, 0, _QUARTERS)
    return table_weight(blocks, _iq2_s_codes, scales, "iq2", 16)


def _iq2_s_codes(blocks: Blocks) -> Bytes:
    # Two upper bits of each of 32 numbers.
    upper = fields_of(blocks.field(66, 74), 2).swapaxes(-1, -2).reshape(*blocks.data.shape[:2], 32)
    index = blocks.field(2, 34) | upper.astype(np.uint16) << 8
    magnitudes = np.take(gguf_grids.rows("IQ2_S"), index)
    return _bytes(magnitudes | np.take(_SIGNS, blocks.field(34, 66)))


def _iq3_xxs(blocks: Blocks) -> Table:
    scale = _words(blocks, 66, 98, np.uint32) >> 28
    return table_weight(blocks, _iq3_xxs_codes, _scales(scale, blocks, 0, _HALVES), "iq3_xxs")


def _iq3_xxs_codes(blocks: Blocks) -> Bytes:
    magnitudes = _of_four("IQ3_XXS", blocks.field(2, 66))
    signs = _seven_signs(_words(blocks, 66, 98, np.uint32))
    return _bytes(magnitudes | signs.reshape(magnitudes.shape))


def _iq3_s(blocks: Blocks) -> Table:
    scales = _scales(halves_of(blocks.field(106, 110)), blocks, 0, _ODD)
    return table_weight(blocks, _iq3_s_codes, scales, "iq3_s")


def _iq3_s_codes(blocks: Blocks) -> Bytes:
    # The ninth bit of each of 64 numbers.
    upper = fields_of(blocks.field(66, 74), 1).swapaxes(-1, -2).reshape(*blocks.data.shape[:2], 64)
    magnitudes = _of_four("IQ3_S", blocks.field(2, 66) | upper.astype(np.uint16) << 8)
    return _bytes(magnitudes | np.take(_SIGNS, blocks.field(74, 106)))


def _iq1_s(blocks: Blocks) -> Table:
    scale = _words(blocks, 34, 50, np.uint16) >> 12 & 7
    return table_weight(blocks, _iq1_s_codes, _scales(scale, blocks, 0, _ODD_EIGHTHS), "iq1")


def _iq1_s_codes(blocks: Blocks) -> Bytes:
    words = _words(blocks, 34, 50, np.uint16)  # three upper bits of four numbers, scale, offset
    upper = words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    index = blocks.field(2, 34).reshape(upper.shape) | upper << np.uint16(8)
    return _iq1_bytes(index, (words >> 15)[..., None])


def _iq1_bytes(index: Words, below: Words) -> Bytes:
    offset = below.astype(np.uint32) * np.uint32(_DELTA_BELOW * 0x11111111)
    return _bytes(np.take(gguf_grids.rows("IQ1"), index) + offset)


def _iq1_m(blocks: Blocks) -> Table:
    words = _words(blocks, 48, 56, np.uint16)  # four scales, and a quarter of the outer one
    outer = (words >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(-1, dtype=np.uint16)
    scale = words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    codes = scale.reshape(*words.shape[:2], 16)
    halves = torch.from_numpy(outer.view(np.float16))
    return table_weight(blocks, _iq1_m_codes, six_bits(codes, halves, _ODD_EIGHTHS), "iq1", 16)


def _iq1_m_codes(blocks: Blocks) -> Bytes:
    upper = halves_of(blocks.field(32, 48))  # three upper bits of a number, offset
    index = blocks.field(0, 32) | (upper & np.uint8(7)).astype(np.uint16) << 8
    return _iq1_bytes(index, upper >> np.uint8(3))


def _scales(codes: Words, blocks: Blocks, start: int, values: torch.Tensor) -> NestedScales:
    """Scales in codes [N, b, n] through `values`, times the float16 at `start` of a block."""
    return six_bits(codes, blocks.half(start), values)


UNPACK_IQ: Mapping[str, Callable[[Blocks], Table]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
