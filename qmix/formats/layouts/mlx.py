"""MLX's layout: the tensors of one weight, read and written.

A row's codes are a little-endian stream of bits in uint32 words, the first input lowest. Affine
weights have scales and biases of one float dtype, w = code * scale + bias; "mxfp4" and "nvfp4" have
codes of E2M1 and scales of one byte, E8M0 for 32 inputs or E4M3 for 16, without biases; nvfp4 of
stacked experts may have a float32 besides, the largest weight of an expert (mlx 0.32). `mlx` rounds
each operation to the scales' dtype; what is read here is exact in float32, and equal to what it
gives for scales and biases in float32. Knows nothing of files.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qmix.formats.layouts import fp4
from qmix.formats.layouts.checked_tensors import IntegerTensors
from qmix.formats.layouts.mlx_config import IN_PLANES, KINDS
from qmix.formats.layouts.tensor_names import BIASES, EXPERT_SCALE, SCALES, WEIGHT, WORD_BITS
from qmix.formats.tensor_spec import TensorSpec
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import Scheme
from qmix.weights.table import Table

_LARGEST = 448.0 * 6.0  # of a scale times a code: nvfp4's global scale is the weight's own
_TILE_BYTES = 1 << 20  # whose codes are put in planes at a time
_CODE_LANES = 8  # so many codes fill whole bytes, whatever their bits


def unpack(
    tensors: Mapping[str, Tensor], prefix: str, where: str, shape: tuple[int, int]
) -> Affine | Table:
    """The weight of module `prefix`, after checking each of its tensors against the others.

    Args:
        tensors: by name; tensors of other modules may be among them.
        where: the file, for errors.
        shape: (N, K) of the model's weight.

    Raises:
        CheckpointError: a tensor is missing, or is not what the layout says.
    """
    stored = IntegerTensors(tensors, prefix, where, shape)
    rows, columns = shape
    words = stored.tensor(WEIGHT, torch.uint32)
    if words.dim() != 2 or words.shape[0] != rows:
        raise stored.wrong(WEIGHT, "wrong shape", f"[{rows}, words]", list(words.shape))
    bits = words.shape[1] * WORD_BITS / columns
    if stored.tensor(SCALES).dtype == torch.uint8:
        if bits != 4 or stored.has(BIASES):
            what, found = "no 4-bit floats", f"{bits:g} bits, biases: {stored.has(BIASES)}"
            raise stored.wrong(WEIGHT, what, "4 bits and no biases beside uint8 scales", found)
        return _fp4(stored, words)
    if bits not in KINDS:
        expected = f"codes of {', '.join(map(str, KINDS))} bits"
        raise stored.wrong(WEIGHT, "wrong shape", expected, list(words.shape))
    if stored.has(EXPERT_SCALE):
        raise stored.wrong(EXPERT_SCALE, "left over beside affine codes", "no such tensor")
    scales, biases = stored.scales(SCALES, 1), stored.scales(BIASES, 1)
    if biases.shape != scales.shape:
        raise stored.wrong(BIASES, "wrong shape", list(scales.shape), list(biases.shape))
    if biases.dtype != scales.dtype:
        raise stored.wrong(BIASES, "wrong dtype", scales.dtype, biases.dtype)
    codes = words.view(torch.uint8)
    if bits in IN_PLANES:
        codes = _in_planes(codes, int(bits))
    return Affine(codes, scales, bits=int(bits), biases=biases)


def _fp4(stored: IntegerTensors, words: Tensor) -> Table:
    rows, columns = stored.shape
    scales, outer = stored.tensor(SCALES), torch.ones(1)
    block = columns / max(scales.shape[-1], 1) if scales.shape[:-1] == (rows,) else 0
    if block not in (fp4.NVFP4_BLOCK, fp4.MXFP4_BLOCK):
        expected = f"[{rows}, {columns} / 16 (nvfp4) or / 32 (mxfp4)]"
        raise stored.wrong(SCALES, "wrong shape", expected, list(scales.shape))
    if block == fp4.MXFP4_BLOCK:
        values = fp4.e8m0()
        if stored.has(EXPERT_SCALE):
            raise stored.wrong(EXPERT_SCALE, "left over in mxfp4", "no such tensor")
    else:
        values = fp4.e4m3()
        if stored.has(EXPERT_SCALE):
            outer = fp4.positive(stored, EXPERT_SCALE) / _LARGEST
    codes = words.view(torch.uint8)
    return fp4.e2m1_table(stored, SCALES, codes, scales, stored.shape, values, outer)


def _in_planes(stream: Tensor, bits: int) -> Tensor:
    """Codes of 5 or 6 bits as a weight holds them, uint8 [N, K * bits / 8], some rows at a time."""
    step = max(1, _TILE_BYTES // stream.shape[1])
    slabs = (pack_codes(_codes(slab, bits), bits) for slab in torch.split(stream, step))
    out, first = torch.empty_like(stream), 0
    for slab in slabs:
        out[first : first + len(slab)] = slab
        first += len(slab)
    return out


def _codes(stream: Tensor, bits: int) -> Tensor:
    """Codes of 5 or 6 bits, uint8 [N, K * bits / 8] -> a byte each, uint8 [N, K]."""
    octets = stream.view(stream.shape[0], -1, bits)
    out = torch.empty(*octets.shape[:2], _CODE_LANES, dtype=torch.uint8)
    for lane in range(_CODE_LANES):
        first, shift = divmod(lane * bits, 8)
        code = octets[..., first] >> shift
        if shift + bits > 8:
            code = code | octets[..., first + 1] << (8 - shift)
        out[..., lane] = code & (1 << bits) - 1
    return out.view(stream.shape[0], -1)


def packed_specs(
    prefix: str, shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype
) -> tuple[TensorSpec, ...]:
    """The tensors that `pack` will return.

    Args:
        shape: (N, K); K a multiple of the group size, and its codes fill whole words.
        dtype: of scales and biases.
    """
    rows, columns = shape
    if scheme.kind == "e2m1":
        return (
            TensorSpec(prefix + WEIGHT, torch.uint32, (rows, columns * scheme.bits // WORD_BITS)),
            TensorSpec(prefix + SCALES, torch.uint8, (rows, columns // scheme.block_size)),
        )
    groups = columns // scheme.group_size
    return (
        TensorSpec(prefix + WEIGHT, torch.uint32, (rows, columns * scheme.bits // WORD_BITS)),
        TensorSpec(prefix + SCALES, dtype, (rows, groups)),
        TensorSpec(prefix + BIASES, dtype, (rows, groups)),
    )


def pack(weight: Affine | Table, prefix: str) -> dict[str, Tensor]:
    """The tensors of one weight with plain scales and biases of one dtype, its inputs in order.

    A table weight is one of E2M1 whose scales are bytes without an outer scale.
    """
    if isinstance(weight, Table):
        assert isinstance(weight.scales, NestedScales)
        words = weight.codes.view(weight.shape[0], -1).contiguous().view(torch.uint32)
        return {prefix + WEIGHT: words, prefix + SCALES: weight.scales.codes}
    assert isinstance(weight.scales, Tensor)
    assert isinstance(weight.biases, Tensor)
    return {
        prefix + WEIGHT: weight.codes.contiguous().view(torch.uint32),
        prefix + SCALES: weight.scales,
        prefix + BIASES: weight.biases,
    }
