"""Rounds weights to NF4 or FP4, byte for byte as bitsandbytes 0.50.2 does on the CPU.

Blocks are independent, so tiles that fit the cache are encoded on several threads. The number of
threads changes no code and no absmax. Shape letters: N outputs, K inputs, B blocks. Knows nothing
of files or models.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import gcd
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmix.errors import CheckpointError, UsageError
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import NESTED_BLOCK, NF4_BLOCK_SIZES, Scheme
from qmix.weights.scheme import NF4 as NF4_SCHEME
from qmix.weights.slabs import SERIAL_ELEMENTS, SLAB_ELEMENTS, TILE_ELEMENTS
from qmix.weights.table import VALUES, Table

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Kind = Literal["nf4", "fp4"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The reciprocal of a smaller absmax would overflow; bitsandbytes clamps here too.
_SMALLEST_ABSMAX = np.float32(1e-38)
_DYNAMIC_STEPS = 1 << 16
_NESTED_GROUPS = 128  # groups rounded at a time: their 32768 scales stay in the cache


def table(kind: Kind = "nf4") -> Tensor:
    """The value of each code, float32 [16]."""
    return torch.tensor(VALUES[kind], dtype=torch.float32)


@cache
def _midpoints(kind: Kind) -> tuple[np.float32, ...]:
    """The 15 midpoints between neighbours of the table, in order, rounded to float32."""
    values = np.sort(np.array(VALUES[kind], np.float32))
    return tuple((values[:-1] + values[1:]) / np.float32(2))


@cache
def _order(kind: Kind) -> U8 | None:
    """The code of each value of the table in order, uint8 [16]; None if that is its place."""
    order = np.argsort(np.array(VALUES[kind], np.float32), kind="stable").astype(np.uint8)
    return None if (order == np.arange(16)).all() else order


def dynamic_map() -> Tensor:
    """The signed 8-bit "dynamic" type of https://arxiv.org/abs/1511.04561, ascending float32 [256].

    Each decade from 10^-6 to 10^0 has 2^0 to 2^6 values of either sign: the midpoints of equal
    parts of [0.1, 1]. Zero and one are added; minus one is not in the map.

    bitsandbytes takes the parts from `torch.linspace`, whose last bits depend on whether the
    processor fuses multiplication and addition. Every processor since 2013 does. The fused result
    is computed here in float64 and rounded once, so that every machine writes the same file.
    """
    low, high = np.float32(0.1), np.float32(1)
    positive = []
    for decade in range(7):
        parts = 2**decade
        part = np.float64((high - low) / np.float32(parts))
        index = np.arange(parts + 1, dtype=np.float64)
        upper = index >= (parts + 1) // 2  # linspace counts these from the upper end
        edges = np.where(upper, high - part * (parts - index), low + part * index)
        edges = edges.astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (decade - 6)) * middles)
    half = np.concatenate(positive)
    return torch.from_numpy(np.sort(np.concatenate((half, -half, np.array((0, 1), np.float32)))))


@cache
def _dynamic_codes() -> U8:
    """The dynamic code of each of 65536 equal steps from -1 to 1, uint8 [65536].

    bitsandbytes first rounds to the nearest step and then takes the step's code, so a value within
    1/131070 of a midpoint may get the farther code. 0.1 % of the codes differ from exact rounding.
    """
    values = dynamic_map().numpy()
    midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
    steps = np.arange(_DYNAMIC_STEPS, dtype=np.float32)
    steps = (steps + steps) / np.float32(_DYNAMIC_STEPS - 1) - np.float32(1)
    return np.searchsorted(midpoints, steps, side="left").astype(np.uint8)


def quantize(weight: Tensor, scheme: Scheme = NF4_SCHEME, *, where: str = "weight") -> Table:
    """Round a weight to NF4 or FP4.

    Each code names the table's value nearest to `w * (1 / absmax)` in float32, where absmax is the
    largest magnitude of the block. A tie goes to the lower code. A block of zeros has absmax 0 and
    codes 7. A short last block is divided by its absmax instead, which is at least 1e-38
    (bitsandbytes 0.50.2, backends/default/ops.py, `quantize_4bit`).

    The offset of the nested scales is `torch.mean`. From 32768 blocks on, its last bit depends on
    torch's thread count, as bitsandbytes' does. Nothing else here depends on it.

    Args:
        weight: bfloat16, float16 or float32 [N, K]; any strides, any device.
        scheme: of kind `nf4` or `fp4`.
        where: file and tensor, for errors.

    Returns:
        The packed weight, on the CPU. Besides it and the input, 14336 x 4096 takes about 15 MB.

    Raises:
        CheckpointError: NaN or infinity in the weight, or another dtype or number of dimensions.
        UsageError: the scheme is neither, or bitsandbytes does not know its block size.
    """
    _check(weight, scheme, where)
    kind: Kind = "fp4" if scheme.kind == "fp4" else "nf4"
    codes, absmax = _encode_slabs(weight, scheme.block_size, kind, where)
    scales = torch.from_numpy(absmax)
    return Table(
        codes=torch.from_numpy(codes),
        scales=_nest(scales, where) if scheme.double_quant else scales,
        table=table(kind),
        out_shape=(weight.shape[0], weight.shape[1]),
        out_dtype=weight.dtype,
        block_size=scheme.block_size,
        kind=kind,
    )


def _check(weight: Tensor, scheme: Scheme, where: str) -> None:
    if scheme.kind not in ("nf4", "fp4") or scheme.block_size not in NF4_BLOCK_SIZES:
        raise UsageError(
            "not a scheme of NF4 or FP4",
            expected=f"nf4 or fp4 with a block of {', '.join(map(str, NF4_BLOCK_SIZES))}",
            found=f"{scheme.kind}, block {scheme.block_size}",
        )
    if weight.dtype not in _DTYPES or weight.ndim != 2 or not weight.numel():
        raise CheckpointError(
            "not a weight that can be quantized",
            where=where,
            expected="bfloat16, float16 or float32 [N, K]",
            found=f"{weight.dtype} {list(weight.shape)}".removeprefix("torch."),
        )


def _encode_slabs(weight: Tensor, block: int, kind: Kind, where: str) -> tuple[U8, F32]:
    """The codes of a weight, two to a byte, and the absmax of each block."""
    count = weight.numel()
    codes = np.empty(-(-count // 2), np.uint8)
    absmax = np.empty(-(-count // block), np.float32)

    def encode(rows: tuple[int, int]) -> None:
        first = rows[0] * weight.shape[1]
        flat = weight.detach()[rows[0] : rows[1]].cpu().reshape(-1)
        if not _encode(flat, block, kind, codes[first // 2 :], absmax[first // block :]):
            raise CheckpointError(
                "NaN, infinity or a value beyond float32 in the weight",
                where=where,
                remedy="The checkpoint is damaged; download it again.",
            )

    slabs = list(_slabs(weight.shape[0], weight.shape[1], block))
    if len(slabs) == 1 or not weight.is_contiguous():  # torch's own threads copy the strided one
        for slab in slabs:
            encode(slab)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(encode, slabs):
                pass
    return codes, absmax


def _slabs(rows: int, columns: int, block: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of which begins with a block."""
    aligned_rows = block // gcd(columns, block)
    step = aligned_rows * max(1, SLAB_ELEMENTS // (aligned_rows * columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _encode(flat: Tensor, block: int, kind: Kind, codes: U8, absmax: F32) -> bool:
    """Encode `flat` [n] into the front of `codes` and `absmax`.

    Returns:
        False if a value is not finite.
    """
    values = np.empty(TILE_ELEMENTS, np.float32)
    full = flat.numel() // block * block
    for start in range(0, full, TILE_ELEMENTS):
        stop = min(start + TILE_ELEMENTS, full)
        scaled = values[: stop - start]
        largest = absmax[start // block : stop // block]
        if not _scale(flat[start:stop].view(-1, block), scaled.reshape(-1, block), largest):
            return False
        codes[start // 2 : stop // 2] = _codes(scaled, kind)
    rest = flat[full:].float().numpy()
    if rest.size:
        magnitude = np.maximum(np.abs(rest).max(), _SMALLEST_ABSMAX)
        if not np.isfinite(magnitude):
            return False
        absmax[full // block] = magnitude
        padded = np.append(rest / magnitude, np.zeros(rest.size % 2, np.float32))
        codes[full // 2 : full // 2 + padded.size // 2] = _codes(padded, kind)
    return True


def _scale(blocks: Tensor, scaled: F32, absmax: F32) -> bool:
    """Divide `blocks` [B, block] by their largest magnitudes.

    Returns:
        False if one of these is not finite.
    """
    step = SERIAL_ELEMENTS // blocks.shape[1]
    parts = torch.split(torch.from_numpy(scaled), step)
    # Each call converts or multiplies all parts on this thread, without the interpreter's lock.
    torch._foreach_copy_(parts, torch.split(blocks, step))
    magnitudes = torch.split(torch.from_numpy(np.abs(scaled)), step)
    largest = torch.split(torch.from_numpy(absmax), step)
    for part, target in zip(magnitudes, largest, strict=True):
        torch.amax(part, 1, out=target)
    if not np.isfinite(absmax).all():
        return False
    inverse = torch.from_numpy(np.float32(1) / np.maximum(absmax, _SMALLEST_ABSMAX))
    torch._foreach_mul_(parts, torch.split(inverse[:, None], step))
    return True


def _codes(scaled: F32, kind: Kind) -> U8:
    """The codes of values in [-1, 1], two to a byte: [a b | c d] -> [ab cd]."""
    # A code is the number of midpoints below the value. Fifteen comparisons, which numpy
    # vectorizes, take 1.2 ns a value on a Zen 4 core; torch.bucketize takes 5.6.
    code = np.empty(scaled.size, np.uint8)
    above = np.empty(scaled.size, np.bool_)
    lowest, *others = _midpoints(kind)
    np.greater(scaled, lowest, out=code.view(np.bool_))
    for midpoint in others:
        np.greater(scaled, midpoint, out=above)
        np.add(code, above.view(np.uint8), out=code)
    order = _order(kind)
    if order is not None:
        code = order[code]
    # The pair is a + 256 b. Multiplied by 4097, its upper byte is 16 a + b.
    pair = code.view("<u2")
    np.multiply(pair, 4097, out=pair)
    return code[1::2]


def _nest(absmax: Tensor, where: str) -> NestedScales:
    """Round float32 absmax [B] to 8 bits around their mean (bitsandbytes' `quantize_blockwise`).

    A group whose absmax all equal the mean gets codes 0, not the code of zero. Its own absmax is 0,
    so it decodes to the mean all the same.
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
    return NestedScales(
        codes=torch.from_numpy(codes.reshape(-1)[: centred.size]),
        outer=torch.from_numpy(largest),
        map=dynamic_map(),
        offset=offset.item(),
    )


def _nested_codes(groups: F32, largest: F32) -> U8:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = np.clip(groups * (np.float32(1) / largest)[:, None], np.float32(-1), np.float32(1))
        # Product and sum are rounded once, because bitsandbytes' binary fuses the two operations.
        step = (scaled + np.float32(1)) * np.float32(0.5)
        step = (step.astype(np.float64) * (_DYNAMIC_STEPS - 1) + 0.5).astype(np.float32)
    # Zero times an infinite reciprocal is NaN, which bitsandbytes' conversion turns into step 0.
    codes: U8 = _dynamic_codes()[np.nan_to_num(step, nan=0.0).astype(np.intp)]
    return codes
