"""Rounds weights to NF4, byte for byte as bitsandbytes 0.50.2 does on the CPU.

Blocks are independent of each other: tiles that fit the cache are encoded on several threads, and
the number of threads changes no code and no absmax. Knows nothing of files or of models.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import gcd

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.errors import CheckpointError, UsageError
from qmix.weights.nf4 import NF4, NF4_VALUES, NestedAbsmax
from qmix.weights.scheme import NESTED_BLOCK, NF4_BLOCK_SIZES, Scheme
from qmix.weights.scheme import NF4 as NF4_SCHEME
from qmix.weights.slabs import SERIAL_ELEMENTS, SLAB_ELEMENTS, TILE_ELEMENTS

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Below this the reciprocal of an absmax would overflow; bitsandbytes clamps there too.
_SMALLEST = np.float32(1e-38)
_DYNAMIC_BINS = 1 << 16
_NESTED_GROUPS = 128  # 32768 scales at a time stay in the cache


def table() -> Tensor:
    """float32 [16]: the value of each code."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32)


@cache
def _bounds() -> tuple[np.float32, ...]:
    """The 15 values halfway between neighbours of the table, rounded to float32."""
    values = np.array(NF4_VALUES, np.float32)
    return tuple((values[:-1] + values[1:]) / np.float32(2))


def dynamic_map() -> Tensor:
    """float32 [256], ascending: the signed 8-bit "dynamic" type of arXiv 1511.04561.

    A code has a sign, a decade 10^-6 .. 10^0, and 2^0 .. 2^6 values within its decade: the
    midpoints of equal parts of [0.1, 1]. Zero and one are added; minus one is not in the map.

    bitsandbytes takes the parts from `torch.linspace`, whose last bits depend on whether the
    processor fuses multiplication and addition. All since 2013 do: that is computed here, in
    float64 and rounded once, so that a file is the same from any machine.
    """
    low, high = np.float32(0.1), np.float32(1)
    positive = []
    for decade in range(7):
        parts = 2**decade
        part = np.float64((high - low) / np.float32(parts))
        index = np.arange(parts + 1, dtype=np.float64)
        upper = index >= (parts + 1) // 2  # counted from the upper end
        edges = np.where(upper, high - part * (parts - index), low + part * index)
        edges = edges.astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (decade - 6)) * middles)
    half = np.concatenate(positive)
    return torch.from_numpy(np.sort(np.concatenate((half, -half, np.array((0, 1), np.float32)))))


@cache
def _dynamic_codes() -> U8:
    """uint8 [65536]: the dynamic code of each of 65536 equal steps from -1 to 1.

    bitsandbytes rounds to the nearest step first and takes the step's code after, so a value within
    1/131070 of a midpoint may get the farther code; 0.1 % of the codes differ from exact rounding.
    """
    values = dynamic_map().numpy()
    bounds = (values[:-1] + values[1:]) * np.float32(0.5)
    steps = np.arange(_DYNAMIC_BINS, dtype=np.float32)
    steps = (steps + steps) / np.float32(_DYNAMIC_BINS - 1) - np.float32(1)
    return np.searchsorted(bounds, steps, side="left").astype(np.uint8)


def quantize(weight: Tensor, scheme: Scheme = NF4_SCHEME, *, where: str = "weight") -> NF4:
    """Round a weight to NF4.

    A code is the table's value nearest to `w * (1 / absmax)` in float32, where absmax is the
    largest magnitude of the block; a tie goes to the lower code. A block of zeros has absmax 0 and
    codes 7. A short last block is divided by its absmax instead, and that is at least 1e-38
    (bitsandbytes 0.50.2, backends/default/ops.py, `quantize_4bit`).

    The offset of the nested scales is `torch.mean`: from 32768 blocks on, its last bit depends on
    torch's thread count. It is the only thing here that does, and bitsandbytes' does alike.

    Args:
        weight: bfloat16, float16 or float32 [N, K]; any strides, any device.
        scheme: of kind `nf4`.
        where: file and tensor, for the error.

    Returns:
        The packed weight, on the CPU. For 14336 x 4096 about 15 MB are held beside it and the input.

    Raises:
        CheckpointError: NaN or infinity in the weight, or another dtype or number of dimensions.
        UsageError: a scheme that is not NF4, or has a block size that bitsandbytes does not know.
    """
    if scheme.kind != "nf4" or scheme.block_size not in NF4_BLOCK_SIZES:
        raise UsageError(
            "not a scheme of NF4",
            expected=f"nf4 with a block of {', '.join(map(str, NF4_BLOCK_SIZES))}",
            found=f"{scheme.kind}, block {scheme.block_size}",
        )
    if weight.dtype not in _DTYPES or weight.ndim != 2 or not weight.numel():
        raise CheckpointError(
            "not a weight that can be quantized",
            where=where,
            expected="bfloat16, float16 or float32 [N, K]",
            found=f"{weight.dtype} {list(weight.shape)}".removeprefix("torch."),
        )
    block, count = scheme.block_size, weight.numel()
    codes = np.empty(-(-count // 2), np.uint8)
    absmax = np.empty(-(-count // block), np.float32)

    def encode(rows: tuple[int, int]) -> None:
        first = rows[0] * weight.shape[1]
        flat = weight.detach()[rows[0] : rows[1]].cpu().reshape(-1)
        if not _encode(flat, block, codes[first // 2 :], absmax[first // block :]):
            raise CheckpointError(
                "NaN, infinity or a value beyond float32 in the weight",
                where=where,
                remedy="The checkpoint is damaged; download it again.",
            )

    slabs = list(_slabs(weight.shape[0], weight.shape[1], block))
    if len(slabs) == 1 or not weight.is_contiguous():  # torch copies on its own threads
        for slab in slabs:
            encode(slab)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(encode, slabs):
                pass
    scales = torch.from_numpy(absmax)
    return NF4(
        codes=torch.from_numpy(codes),
        absmax=_nest(scales, where) if scheme.double_quant else scales,
        table=table(),
        out_shape=(weight.shape[0], weight.shape[1]),
        out_dtype=weight.dtype,
        block_size=block,
    )


def _slabs(rows: int, columns: int, block: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that begin with a block."""
    unit = block // gcd(columns, block)
    step = unit * max(1, SLAB_ELEMENTS // (unit * columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _encode(flat: Tensor, block: int, codes: U8, absmax: F32) -> bool:
    """Encode `flat` [n] into the front of `codes` and `absmax`; False if a value is not finite."""
    values = np.empty(TILE_ELEMENTS, np.float32)
    full = flat.numel() // block * block
    for start in range(0, full, TILE_ELEMENTS):
        stop = min(start + TILE_ELEMENTS, full)
        scaled = values[: stop - start]
        largest = absmax[start // block : stop // block]
        if not _scale(flat[start:stop].view(-1, block), scaled.reshape(-1, block), largest):
            return False
        codes[start // 2 : stop // 2] = _codes(scaled)
    rest = flat[full:].float().numpy()
    if rest.size:
        magnitude = np.maximum(np.abs(rest).max(), _SMALLEST)
        if not np.isfinite(magnitude):
            return False
        absmax[full // block] = magnitude
        padded = np.append(rest / magnitude, np.zeros(rest.size % 2, np.float32))
        codes[full // 2 : full // 2 + padded.size // 2] = _codes(padded)
    return True


def _scale(blocks: Tensor, scaled: F32, absmax: F32) -> bool:
    """Divide `blocks` [B, block] by their largest magnitudes; False if one is not finite."""
    step = SERIAL_ELEMENTS // blocks.shape[1]
    parts = torch.split(torch.from_numpy(scaled), step)
    # One call converts or multiplies all parts on this thread, without the interpreter's lock.
    torch._foreach_copy_(parts, torch.split(blocks, step))
    magnitudes = torch.split(torch.from_numpy(np.abs(scaled)), step)
    largest = torch.split(torch.from_numpy(absmax), step)
    for part, target in zip(magnitudes, largest, strict=True):
        torch.amax(part, 1, out=target)
    if not np.isfinite(absmax).all():
        return False
    inverse = torch.from_numpy(np.float32(1) / np.maximum(absmax, _SMALLEST))
    torch._foreach_mul_(parts, torch.split(inverse[:, None], step))
    return True


def _codes(scaled: F32) -> U8:
    """The codes of values in [-1, 1], two to a byte: [a b | c d] -> [ab cd]."""
    # A code is the number of bounds below the value. Fifteen comparisons that numpy vectorizes take
    # 1.2 ns a value on a Zen 4 core, torch.bucketize 5.6.
    code = np.empty(scaled.size, np.uint8)
    above = np.empty(scaled.size, np.bool_)
    lowest, *others = _bounds()
    np.greater(scaled, lowest, out=code.view(np.bool_))
    for bound in others:
        np.greater(scaled, bound, out=above)
        np.add(code, above.view(np.uint8), out=code)
    # a + 256 b, times 4097: the upper byte of the 16-bit product is 16 a + b.
    pair = code.view("<u2")
    np.multiply(pair, 4097, out=pair)
    return code[1::2]


def _nest(absmax: Tensor, where: str) -> NestedAbsmax:
    """Round float32 absmax [B] to 8 bits around their mean (bitsandbytes' `quantize_blockwise`).

    A group in which every absmax equals the mean gets codes 0, not the code of zero; its own
    absmax is 0, so they decode to the mean all the same.
    """
    offset = absmax.mean()
    centred = (absmax - offset).numpy()
    groups = np.pad(centred, (0, -centred.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    largest = np.abs(groups).max(axis=1)
    if not np.isfinite(largest).all():
        raise CheckpointError(
            "weights so large that the mean of their scales overflows", where=where
        )
    codes = np.empty(groups.shape, np.uint8)
    for first in range(0, len(groups), _NESTED_GROUPS):
        tile = slice(first, first + _NESTED_GROUPS)
        codes[tile] = _nested_codes(groups[tile], largest[tile])
    return NestedAbsmax(
        codes=torch.from_numpy(codes.reshape(-1)[: centred.size]),
        absmax=torch.from_numpy(largest),
        map=dynamic_map(),
        offset=offset.item(),
    )


def _nested_codes(groups: F32, largest: F32) -> U8:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = np.clip(groups * (np.float32(1) / largest)[:, None], np.float32(-1), np.float32(1))
        # The product and the sum are rounded together: bitsandbytes' binary uses a fused operation.
        step = (scaled + np.float32(1)) * np.float32(0.5)
        step = (step.astype(np.float64) * (_DYNAMIC_BINS - 1) + 0.5).astype(np.float32)
    # Zero times an infinite reciprocal is NaN; bitsandbytes' conversion makes it step 0.
    codes: U8 = _dynamic_codes()[np.nan_to_num(step, nan=0.0).astype(np.intp)]
    return codes
