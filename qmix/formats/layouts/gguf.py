"""GGUF's quantized types: the bytes of one tensor's rows -> the weight, without rounding.

Codes keep their bits. The values are those of llama.cpp (gguf 0.19, quants.py), bit for bit in
float32. Knows no file.

N, K: rows and inputs. b: blocks of a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.gguf.tensor_types import BY_NAME
from qmix.weights.affine import Affine
from qmix.weights.scales import NestedScales, pack_six_bits
from qmix.weights.slabs import decoded
from qmix.weights.table import IQ4_VALUES, Table

Bytes = NDArray[np.uint8]

_TILE_BYTES = 1 << 17
_SIX_BITS = torch.arange(64, dtype=torch.float32)
_SUBTRACTED = -_SIX_BITS  # of biases
_EIGHT_BITS = torch.arange(256, dtype=torch.float32) - 128


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


def unpack(
    data: Tensor, kind: str, name: str, where: str, shape: tuple[int, int]
) -> Affine | Table:
    """The weight in a tensor's bytes.

    Args:
        data: uint8 [N, bytes of a row].
        kind: GGUF's type.
        name, where: of the tensor and the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: another shape, or a scale that is NaN or infinite.
    """
    kind_of = BY_NAME[kind]
    rows, columns = shape
    expected = (rows, columns // kind_of.block_size * kind_of.block_bytes)
    if tuple(data.shape) != expected:
        raise CheckpointError(
            f"tensor {name}: wrong shape", where=where, expected=expected, found=list(data.shape)
        )
    weight = _UNPACK[kind](Blocks(data.numpy().reshape(rows, -1, kind_of.block_bytes)))
    for scales in (weight.scales, weight.biases if isinstance(weight, Affine) else None):
        values = scales.outer if isinstance(scales, NestedScales) else scales
        if values is not None and not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"tensor {name}: a scale of {kind} is NaN or infinite",
                where=where,
                expected="finite scales",
                remedy="The file is damaged; download it again.",
            )
    return weight


def _codes(blocks: Blocks, decode: Callable[[Blocks], Bytes]) -> Tensor:
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


def _neighbours(codes: Bytes, group: int) -> Bytes:
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


def _q4_0(blocks: Blocks) -> Affine:
    codes = _codes(blocks, lambda part: _neighbours(part.field(2, 18), 16))
    return Affine(codes=codes, scales=blocks.half(0))


def _q4_1(blocks: Blocks) -> Affine:
    codes = _codes(blocks, lambda part: _neighbours(part.field(4, 20), 16))
    return Affine(codes=codes, scales=blocks.half(0), biases=blocks.half(2))


def _q5_0(blocks: Blocks) -> Affine:
    codes = _codes(blocks, lambda part: _five_bits(part, 2))
    return Affine(codes=codes, scales=blocks.half(0), bits=5)


def _q5_1(blocks: Blocks) -> Affine:
    codes = _codes(blocks, lambda part: _five_bits(part, 4))
    return Affine(codes=codes, scales=blocks.half(0), biases=blocks.half(2), bits=5)


def _five_bits(blocks: Blocks, start: int) -> Bytes:
    """The codes of Q5_0 and Q5_1 in planes: 32 highest bits, then 16 bytes of lower halves."""
    lower = _neighbours(blocks.field(start + 4, start + 20), 16)
    upper = blocks.field(start, start + 4).reshape(len(lower), -1)
    return np.concatenate((lower, upper), 1)


def _q8_0(blocks: Blocks) -> Affine:
    codes = _codes(
        blocks, lambda part: part.field(2, 34).reshape(len(part.data), -1) ^ np.uint8(0x80)
    )
    return Affine(codes=codes, scales=blocks.half(0), bits=8)


def _nested(blocks: Blocks) -> tuple[NestedScales, NestedScales]:
    """Scales and biases of Q4_K and Q5_K, eight of each a block, of six bits.

    Of the twelve bytes, the first four hold scales 0 to 3, the next four biases 0 to 3, and their
    highest two bits are those of scales and biases 4 to 7, whose low halves are in the last four.
    """
    packed = blocks.field(4, 16)
    scale, bias, low = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate((scale & 63, low & 15 | scale >> 2 & 48), -1)
    biases = np.concatenate((bias & 63, low >> 4 | bias >> 2 & 48), -1)
    return (
        _six_bits(scales, blocks.half(0), _SIX_BITS),
        _six_bits(biases, blocks.half(2), _SUBTRACTED),
    )


def _six_bits(codes: Bytes, outer: Tensor, values: Tensor) -> NestedScales:
    """Scales in codes of six bits [N, b, 8], which share an outer one [N, b]."""
    packed = pack_six_bits(torch.from_numpy(codes)).flatten(1)
    return NestedScales(packed, outer.flatten(), values, block=codes.shape[-1], bits=6)


def _q4_k(blocks: Blocks) -> Affine:
    scales, biases = _nested(blocks)
    codes = _codes(blocks, lambda part: _neighbours(part.field(16, 144), 32))
    return Affine(codes=codes, scales=scales, biases=biases)


def _q5_k(blocks: Blocks) -> Affine:
    scales, biases = _nested(blocks)
    return Affine(codes=_codes(blocks, _q5_k_codes), scales=scales, biases=biases, bits=5)


def _q5_k_codes(blocks: Blocks) -> Bytes:
    # Bit i of 32 bytes is the fifth of the i-th 32 codes.
    fifth = np.unpackbits(blocks.field(16, 48), axis=-1, bitorder="little")
    fifth = fifth.reshape(*fifth.shape[:2], 32, 8).swapaxes(-1, -2)
    upper = np.packbits(fifth, axis=-1, bitorder="little").reshape(len(fifth), -1)
    return np.concatenate((_neighbours(blocks.field(48, 176), 32), upper), 1)


def _q6_k(blocks: Blocks) -> Affine:
    scales = blocks.field(192, 208).reshape(len(blocks.data), -1) ^ np.uint8(0x80)  # signed bytes
    nested = NestedScales(
        torch.from_numpy(scales), blocks.half(208).flatten(), _EIGHT_BITS, block=16
    )
    return Affine(codes=_codes(blocks, _q6_k_codes), scales=nested, bits=6)


def _q6_k_codes(blocks: Blocks) -> Bytes:
    rows = len(blocks.data)
    # Two bits of 32 bytes are the upper ones of 32 codes; a weight keeps four neighbours in a byte.
    parts = blocks.field(128, 192).reshape(rows, -1, 1, 8, 4)
    pairs = parts >> np.array([0, 2, 4, 6], np.uint8)[:, None, None] & np.uint8(3)
    upper = pairs[..., 0] | pairs[..., 1] << np.uint8(2)
    upper |= pairs[..., 2] << np.uint8(4) | pairs[..., 3] << np.uint8(6)
    return np.concatenate((_neighbours(blocks.field(0, 128), 64), upper.reshape(rows, -1)), 1)


def _iq4(blocks: Blocks, start: int, scales: Tensor | NestedScales) -> Table:
    """A weight whose codes follow from byte `start` of each block on."""
    end = blocks.data.shape[2]
    codes = _codes(blocks, lambda part: _neighbours(part.field(start, end), 16))
    return Table(
        codes=codes.flatten(),
        scales=scales,
        table=torch.tensor(IQ4_VALUES),
        out_shape=(len(codes), codes.shape[1] * 2),
        out_dtype=torch.float16,
        block_size=32,
        kind="iq4",
        high_first=False,
    )


def _iq4_nl(blocks: Blocks) -> Table:
    return _iq4(blocks, 2, blocks.half(0))


def _iq4_xs(blocks: Blocks) -> Table:
    high = np.ascontiguousarray(blocks.field(2, 4)).view(np.uint16)  # two bits of each scale
    upper = (high >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    lower = blocks.field(4, 8)[..., None] >> np.array([0, 4], np.uint8) & np.uint8(15)
    codes = lower.reshape(upper.shape) | upper << np.uint8(4)
    return _iq4(blocks, 8, _six_bits(codes, blocks.half(0), _SIX_BITS - 32))


_UNPACK: Mapping[str, Callable[[Blocks], Affine | Table]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q4_K": _q4_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
}
