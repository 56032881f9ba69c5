"""GGUF's quantized types: the bytes of one tensor's rows -> the weight, without rounding.

Codes keep their bits. The values are those of llama.cpp (gguf 0.19, quants.py), bit for bit in
float32. Knows no file.

N, K: rows and inputs. b: blocks of a row.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from qmix.errors import CheckpointError
from qmix.formats.layouts.fp4 import e8m0
from qmix.formats.layouts.gguf_fields import (
    Blocks,
    Bytes,
    codes_of,
    fields_of,
    halves_of,
    neighbours,
    six_bits,
    table_weight,
)
from qmix.formats.layouts.gguf_iq import UNPACK_IQ
from qmix.gguf.tensor_types import BY_NAME
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.scales import NestedScales, Scales
from qmix.weights.table import Table

_SIX_BITS = torch.arange(64, dtype=torch.float32)
_SIGNED = _SIX_BITS - 32
_SUBTRACTED = -_SIX_BITS  # of biases
_LARGEST_POWER = 2.0**125  # of MXFP4: six times the next one is infinite
_EIGHT_BITS = torch.arange(256, dtype=torch.float32) - 128


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
        if not _finite(scales):
            raise CheckpointError(
                f"tensor {name}: a scale of {kind} is NaN or infinite",
                where=where,
                expected="finite scales",
                remedy="The file is damaged; download it again.",
            )
    return weight


def _finite(scales: Scales | None) -> bool:
    """Whether all scales are numbers."""
    if not isinstance(scales, NestedScales):
        return scales is None or bool(torch.isfinite(scales).all())
    if not bool(torch.isfinite(scales.outer).all()):
        return False
    known = torch.isfinite(scales.map)
    if bool(known.all()):
        return True
    used = torch.bincount(scales.codes.flatten(), minlength=len(known)) > 0
    return bool(known[used].all())


def _q4_0(blocks: Blocks) -> Affine:
    codes = codes_of(blocks, lambda part: neighbours(part.field(2, 18), 16))
    return Affine(codes=codes, scales=blocks.half(0))


def _q4_1(blocks: Blocks) -> Affine:
    codes = codes_of(blocks, lambda part: neighbours(part.field(4, 20), 16))
    return Affine(codes=codes, scales=blocks.half(0), biases=blocks.half(2))


def _q5_0(blocks: Blocks) -> Affine:
    codes = codes_of(blocks, lambda part: _five_bits(part, 2))
    return Affine(codes=codes, scales=blocks.half(0), bits=5)


def _q5_1(blocks: Blocks) -> Affine:
    codes = codes_of(blocks, lambda part: _five_bits(part, 4))
    return Affine(codes=codes, scales=blocks.half(0), biases=blocks.half(2), bits=5)


def _five_bits(blocks: Blocks, start: int) -> Bytes:
    """The codes of Q5_0 and Q5_1 in planes: 32 highest bits, then 16 bytes of lower halves."""
    lower = neighbours(blocks.field(start + 4, start + 20), 16)
    upper = blocks.field(start, start + 4).reshape(len(lower), -1)
    return np.concatenate((lower, upper), 1)


def _q8_0(blocks: Blocks) -> Affine:
    codes = codes_of(
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
        six_bits(scales, blocks.half(0), _SIX_BITS),
        six_bits(biases, blocks.half(2), _SUBTRACTED),
    )


def _q2_k(blocks: Blocks) -> Affine:
    both = blocks.field(0, 16)  # of a group of 16: four bits of scale, then of bias
    return Affine(
        codes=codes_of(blocks, lambda part: _packed(fields_of(_by_halves(part, 16), 2), 2)),
        scales=six_bits(both & 15, blocks.half(80), _SIX_BITS),
        biases=six_bits(both >> 4, blocks.half(82), _SUBTRACTED),
        bits=2,
    )


def _q3_k(blocks: Blocks) -> Affine:
    # Of 16 scales of six bits, the lower four are in eight bytes, the upper two in four.
    lower = fields_of(blocks.field(96, 104), 4).reshape(*blocks.data.shape[:2], 16)
    upper = fields_of(blocks.field(104, 108), 2).reshape(lower.shape)
    scales = six_bits(lower | upper << np.uint8(4), blocks.half(108), _SIGNED)
    return Affine(codes=codes_of(blocks, _q3_k_codes), scales=scales, bits=3)


def _q3_k_codes(blocks: Blocks) -> Bytes:
    lower = fields_of(_by_halves(blocks, 32), 2)
    third = fields_of(blocks.field(0, 32), 1).reshape(lower.shape)
    return _packed(lower | third << np.uint8(2), 3)


def _by_halves(blocks: Blocks, start: int) -> Bytes:
    """The 64 bytes of two bits from `start` on, 32 for each half of a block: [N, 2 b, 32]."""
    return blocks.field(start, start + 64).reshape(len(blocks.data), -1, 32)


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Codes in order as a weight of so many bits holds them."""
    rows = torch.from_numpy(codes.reshape(len(codes), -1))
    return pack_codes(rows, bits).numpy()


def _q4_k(blocks: Blocks) -> Affine:
    scales, biases = _nested(blocks)
    codes = codes_of(blocks, lambda part: neighbours(part.field(16, 144), 32))
    return Affine(codes=codes, scales=scales, biases=biases)


def _q5_k(blocks: Blocks) -> Affine:
    scales, biases = _nested(blocks)
    return Affine(codes=codes_of(blocks, _q5_k_codes), scales=scales, biases=biases, bits=5)


def _q5_k_codes(blocks: Blocks) -> Bytes:
    # Bit i of 32 bytes is the fifth of the i-th 32 codes.
    fifth = np.unpackbits(blocks.field(16, 48), axis=-1, bitorder="little")
    fifth = fifth.reshape(*fifth.shape[:2], 32, 8).swapaxes(-1, -2)
    upper = np.packbits(fifth, axis=-1, bitorder="little").reshape(len(fifth), -1)
    return np.concatenate((neighbours(blocks.field(48, 176), 32), upper), 1)


def _q6_k(blocks: Blocks) -> Affine:
    scales = blocks.field(192, 208).reshape(len(blocks.data), -1) ^ np.uint8(0x80)  # signed bytes
    nested = NestedScales(
        torch.from_numpy(scales), blocks.half(208).flatten(), _EIGHT_BITS, block=16
    )
    return Affine(codes=codes_of(blocks, _q6_k_codes), scales=nested, bits=6)


def _q6_k_codes(blocks: Blocks) -> Bytes:
    rows = len(blocks.data)
    # Two bits of 32 bytes are the upper ones of 32 codes; a weight keeps four neighbours in a byte.
    parts = blocks.field(128, 192).reshape(rows, -1, 1, 8, 4)
    pairs = parts >> np.array([0, 2, 4, 6], np.uint8)[:, None, None] & np.uint8(3)
    upper = pairs[..., 0] | pairs[..., 1] << np.uint8(2)
    upper |= pairs[..., 2] << np.uint8(4) | pairs[..., 3] << np.uint8(6)
    return np.concatenate((neighbours(blocks.field(0, 128), 64), upper.reshape(rows, -1)), 1)


def _iq4_nl(blocks: Blocks) -> Table:
    return table_weight(
        blocks, lambda part: neighbours(part.field(2, 18), 16), blocks.half(0), "iq4"
    )


def _iq4_xs(blocks: Blocks) -> Table:
    high = np.ascontiguousarray(blocks.field(2, 4)).view(np.uint16)  # two bits of each scale
    upper = (high >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    codes = halves_of(blocks.field(4, 8)) | upper << np.uint8(4)
    scales = six_bits(codes, blocks.half(0), _SIGNED)
    return table_weight(blocks, lambda part: neighbours(part.field(8, 136), 16), scales, "iq4")


def _mxfp4(blocks: Blocks) -> Table:
    exponents = torch.from_numpy(blocks.field(0, 1)[..., 0].copy())
    powers = torch.where(e8m0() > _LARGEST_POWER, torch.nan, e8m0())
    scales = NestedScales(exponents, torch.ones(1), powers, block=exponents.numel())
    return table_weight(blocks, lambda part: neighbours(part.field(1, 17), 16), scales, "e2m1")


_UNPACK: Mapping[str, Callable[[Blocks], Affine | Table]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
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
    "MXFP4": _mxfp4,
    **UNPACK_IQ,
}
