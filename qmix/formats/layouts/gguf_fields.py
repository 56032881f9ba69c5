"""The fields of GGUF's blocks, and how the codes in them become those of a weight.

Knows no type of GGUF's. Shape letters: see qmix.formats.layouts.gguf.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.weights.scales import NestedScales, pack_six_bits
from qmix.weights.slabs import decoded
from qmix.weights.table import VALUES, Table, TableKind

Bytes = NDArray[np.uint8]

_TILE_BYTES = 1 << 17


@dataclass(frozen=True)
class Blocks:
    """The blocks of all rows, uint8 [N, b, block_bytes], cut into fields from the start on."""

    data: Bytes

    def field(self, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of each block, [N, b, stop - start]."""
        return self.data[:, :, start:stop]

    def half(self, start: int) -> Tensor:
        """The float16 that begins at a byte of each block, [N, b]."""
        raw = np.ascontiguousarray(self.field(start, start + 2))
        return torch.from_numpy(raw.view(np.float16)[..., 0])


def codes_of(blocks: Blocks, decode: Callable[[Blocks], Bytes]) -> Tensor:
    """What `decode` makes of the blocks, a few rows at a time, which fit the cache: uint8 [N, ...].

    It also bounds the memory beside the result. Large weights use several threads.
    """
    rows, count, nbytes = blocks.data.shape
    step = max(1, _TILE_BYTES // (count * nbytes))

    def decode_slab(first: int, last: int, out: Tensor) -> None:
        target = out.numpy()
        for start in range(first, last, step):
            stop = min(start + step, last)
            target[start - first : stop - first] = decode(Blocks(blocks.data[start:stop]))

    width = decode(Blocks(blocks.data[:1])).shape[1]
    return decoded(0, rows, width, torch.uint8, decode_slab)


def neighbours(codes: Bytes, group: int) -> Bytes:
    """Codes of 4 bits as a weight holds them: [N, b, bytes] -> uint8 [N, K / 2].

    Of `group` consecutive bytes, llama.cpp keeps the first inputs in the low halves and the next
    ones in the high halves; a weight keeps two neighbours in one byte.
    """
    rows = codes.shape[0]
    words = np.ascontiguousarray(codes).view(np.uint16).reshape(rows, -1, group // 2)
    out = np.empty((rows, words.shape[1], 2, group // 2), np.uint8)
    low = words & 0x0F0F
    np.bitwise_or(low, low >> 4, out=low)
    out[:, :, 0] = low  # the lower byte: the low halves of two bytes
    high = words >> 4
    high &= 0x0F0F
    np.bitwise_or(high, high >> 4, out=high)
    out[:, :, 1] = high
    return out.reshape(rows, -1)


def fields_of(packed: Bytes, bits: int) -> Bytes:
    """Codes of 1, 2 or 4 bits, spread: [N, b, bytes] -> uint8 [N, b, 8 / bits, bytes].

    The first ones are in the lowest bits of all bytes.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return packed[:, :, None] >> shifts & np.uint8((1 << bits) - 1)


def halves_of(packed: Bytes) -> Bytes:
    """The low and then the high half of each byte: [N, b, n] -> uint8 [N, b, 2 n]."""
    return fields_of(packed, 4).swapaxes(-1, -2).reshape(*packed.shape[:2], -1)


def table_weight(
    blocks: Blocks,
    decode: Callable[[Blocks], Bytes],
    scales: Tensor | NestedScales,
    kind: TableKind,
    block: int = 32,
) -> Table:
    """A weight of a table: `decode` gives its codes [N, K / 2], `block` of which share a scale."""
    codes = codes_of(blocks, decode)
    return Table(
        codes=codes.flatten(),
        scales=scales,
        table=torch.tensor(VALUES[kind]),
        out_shape=(len(codes), codes.shape[1] * 2),
        out_dtype=torch.float16,
        block_size=block,
        kind=kind,
        high_first=False,
    )


def six_bits(codes: NDArray[np.integer], outer: Tensor, values: Tensor) -> NestedScales:
    """Scales in codes of six bits [N, b, n], which share an outer one [N, b]."""
    packed = pack_six_bits(torch.from_numpy(codes.astype(np.uint8))).flatten(1)
    return NestedScales(packed, outer.flatten(), values, block=codes.shape[-1], bits=6)
