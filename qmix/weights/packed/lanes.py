"""The codes of a tile in the order of a warp's lanes, and back.

Lane 4g + t of a warp holds rows 8r + g and inputs 16j + 8c + 2t + p of both planes, in the order
c, r, j, p: that of its registers as the first operand of mma.m16n8k16. A byte is a code of each
plane, four bits each, or a code of eight bits; or a lane's words, one for each c and r, are slices
of bits of a whole tile (`bit_slices`).

Knows torch, and nothing of scales and headers. Shape letters: see qmix.kernels.
"""

import torch
from torch import Tensor

from qmix.weights.packed.bit_slices import BLOCK_INPUTS, PAIRS, fields
from qmix.weights.packed.tile_format import BYTE_ROWS, TileFormat

# Dimensions of a matrix of bytes: panel, warp, r, g; tile, block of 32 inputs, j, c, t, p.
_TO_LANES = (0, 4, 5, 1, 3, 8, 7, 2, 6, 9)
# Those of both planes, which are in front, as pairs: a lane's words, then block, plane, j and p.
_TO_PAIRS = (1, 5, 2, 4, 9, 8, 3, 6, 0, 7, 10)
# Panel, tile, warp, g, t, c, r and the word, which comes before the warps.
_TO_SLICES = (0, 1, 7, 2, 3, 4, 5, 6)


def to_lanes(low: Tensor, high: Tensor, tile_format: TileFormat) -> list[Tensor]:
    """Codes uint8 [rows, K] of both planes -> parts of each tile, uint8 [panels, tiles, bytes]."""
    rows, in_features = low.shape
    panels, tiles = rows // BYTE_ROWS, in_features // tile_format.inputs
    shape = panels, 4, 2, 8, tiles, tile_format.inputs // BLOCK_INPUTS, 2, 2, 4, 2
    if tile_format.sliced:
        pairs = torch.stack((low, high)).view(2, *shape).permute(_TO_PAIRS).flatten(7, 9)
        words = _to_words(pairs, tile_format.bits).permute(_TO_SLICES)
        return [words.contiguous().view(torch.uint8).view(panels, tiles, -1)]
    parts = [low, high] if tile_format.bits == 8 else [low | high << 4]
    return [part.view(shape).permute(_TO_LANES).reshape(panels, tiles, -1) for part in parts]


def from_lanes(section: Tensor, tile_format: TileFormat) -> tuple[Tensor, Tensor]:
    """The inverse, of all parts joined: codes uint8 [rows, K] of both planes."""
    panels, tiles, _ = section.shape
    shape = panels * BYTE_ROWS, tiles * tile_format.inputs
    blocks, bits = tile_format.inputs // BLOCK_INPUTS, tile_format.bits
    if tile_format.sliced:
        words = section.contiguous().view(torch.int32).view(panels, tiles, bits, 4, 8, 4, 2, 2)
        pairs = _from_words(words.permute(_inverse(_TO_SLICES)), bits)
        pairs = pairs.view(panels, tiles, 4, 8, 4, 2, 2, blocks, 2, 2, 2)
        low, high = pairs.permute(_inverse(_TO_PAIRS)).reshape(2, *shape)
        return low, high

    def rows_of(part: Tensor) -> Tensor:
        codes = part.reshape(panels, tiles, blocks, 4, 8, 4, 2, 2, 2, 2)
        return codes.permute(_inverse(_TO_LANES)).reshape(shape)

    if bits == 8:
        first, second = section.chunk(2, 2)
        return rows_of(first), rows_of(second)
    both = rows_of(section)
    return both & 15, both >> 4


def _to_words(pairs: Tensor, bits: int) -> Tensor:
    """Pairs of codes uint8 [..., 16, 2] -> the words of their slices, int32 [..., bits]."""
    words = torch.zeros(*pairs.shape[:-2], bits, dtype=torch.int32, device=pairs.device)
    for pair, parts in enumerate(fields(bits)):
        for field in parts:
            for code in range(2):
                part = pairs[..., pair, code].int() >> field.below & (1 << field.width) - 1
                words[..., field.word] |= part << field.first_bit(code)
    return words


def _from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_to_words`."""
    pairs = torch.zeros(*words.shape[:-1], PAIRS, 2, dtype=torch.uint8, device=words.device)
    for pair, parts in enumerate(fields(bits)):
        for field in parts:
            for code in range(2):
                part = words[..., field.word] >> field.first_bit(code) & (1 << field.width) - 1
                pairs[..., pair, code] |= (part << field.below).to(torch.uint8)
    return pairs


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))
