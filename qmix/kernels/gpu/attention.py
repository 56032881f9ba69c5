"""Attention on a GPU: which Triton kernel runs, in how many blocks, over which tiles.

With one new token a row, the columns of a row are split among thread blocks, so that a long context
keeps all multiprocessors busy. The splits are merged in a fixed order: the same arguments give the
same bits. More new tokens are processed in blocks of queries. The length of a row may be known on
the device only; no call waits for it, and all shapes follow from the shapes of the arguments.

Knows nothing of models, and of caches only that column c lies in slot c mod R. Shape letters: see
qmix.kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.errors import UnsupportedError
from qmix.kernels import kv_rows
from qmix.kernels.gpu import attention_triton as kernels
from qmix.kernels.gpu.attention_tuning import UNTUNED, Tuning
from qmix.kernels.gpu.launch import dependency, launch, multiprocessors, power_of_2
from qmix.kernels.gradients import needs_grad

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_WIDTHS = (16, 32, 64, 128)
LARGEST_SPLIT = 64

_EVERYTHING = 2**30  # a window that no context fills
SMALLEST_TILE = 16  # rows of a matrix instruction


@dataclass(frozen=True)
class BlockShape:
    """The shape of a thread block: rows of queries, keys of a tile, warps, tiles in flight."""

    rows: int
    columns: int
    warps: int
    stages: int


def blocks_for(
    queries: int, dtype: torch.dtype, tuning: Tuning = UNTUNED, *, codes: bool = False
) -> BlockShape:
    """The shape of blocks for this many queries.

    Other shapes spill registers (python -m qmix.evals.aot): 64 rows in four warps on compute
    capability 8, most tiles of float32, which the matrix units do not multiply, and of codes 64
    columns under more than one query and 32 under more than 16.
    """
    is_short = queries <= SMALLEST_TILE
    if dtype == torch.float32:
        return BlockShape(SMALLEST_TILE if is_short else 32, tuning.columns or 16, 8, tuning.stages)
    rows, warps = (SMALLEST_TILE, 4) if is_short else (128, 8)
    columns = 64
    if codes and queries > 1:
        columns = 32 if is_short else 16
    return BlockShape(rows, tuning.columns or columns, warps, tuning.stages)


def splits_for(unsplit: int, slots: int, columns: int, wanted: int) -> int:
    """Into how many splits the columns go to turn `unsplit` blocks into `wanted` ones.

    Every split keeps at least one tile.
    """
    return max(1, min(-(-wanted // unsplit), -(-slots // columns), LARGEST_SPLIT))


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries (B, H, S, d), keys and values (B, G, L, d) that the kernels do not support.

    Keys and values may be rows of codes.

    Raises:
        UnsupportedError: another dtype, mixed dtypes, a head width that is no power of 2 from 16 to
            128, or gradients are wanted.
    """
    differentiated = needs_grad(q, k, v)
    if (
        q.dtype in DTYPES
        and (k.dtype == q.dtype or kv_rows.is_rows(k))
        and q.shape[-1] in HEAD_WIDTHS
        and not differentiated
    ):
        return
    found = f"{q.dtype} and {k.dtype}, heads of {q.shape[-1]}".replace("torch.", "")
    raise UnsupportedError(
        "the Triton attention kernel does not fit",
        where="attn_implementation",
        expected="float16, bfloat16 or float32, or rows of codes, heads of 16, 32, 64 or 128, no gradients",
        found=found + (", gradients" if differentiated else ""),
        remedy="Use attn_implementation='sdpa', which means the same.",
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tuning: Tuning = UNTUNED,
    window: int | None,
    padding_mask: Tensor | None,
) -> Tensor:
    """Attention of the last S of L columns: (B, H, S, d) with (B, G, L, d) -> (B, H, S, d).

    Args:
        window: each query sees this many columns, its own included; None sees all before it.
        padding_mask: bool (B, L), False at padding; None: no padding. A query that sees no key
            gives zeros.

    Raises:
        UnsupportedError: as `check`.
    """
    out = _attend(q, k, v, None, None, window, padding_mask, q.dtype, tuning)
    return out.transpose(1, 2)


def attend_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past: Tensor,
    *,
    starts: Tensor | None = None,
    window: int | None = None,
    dtype: torch.dtype | None = None,
    arrivals: Tensor | None = None,
    dependent: bool = False,
    tuning: Tuning = UNTUNED,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention of S new columns over a cache that holds them: [B, S, H, d] -> [B, S, H, d].

    Args:
        keys, values: [B, G, R, d], or rows of codes, column c in slot c mod R. A cache that has
            rolled must hold every column that the new ones see: R >= window + S - 1.
        past: int32 [B] on the device, columns before the new ones.
        starts: int32 [B] on the device, columns of padding on the left; None is none.
        dtype: of the result; None is that of q. Packed matmuls take float16.
        arrivals: int32 zeros [B G or more] on the device, and zeros again after: the last split of
            one new column merges the others. None: a launch of its own does, to the same bits.
        dependent: a step of one new column may start while the launch before drains; see
            `launch.can_depend`.
        new: keys and values [B, G, 1, d] of one new column, contiguous, which are stored as codes
            first.

    Raises:
        UnsupportedError: as `check`.
    """
    q = q.transpose(1, 2)
    dtype = dtype or q.dtype
    return _attend(
        q, keys, values, past, starts, window, None, dtype, tuning, arrivals, dependent, new
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor | None,
    starts: Tensor | None,
    window: int | None,
    padding_mask: Tensor | None,
    dtype: torch.dtype,
    tuning: Tuning,
    arrivals: Tensor | None = None,
    dependent: bool = False,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(B, H, S, d) over (B, G, R, d): [B, S, H, d]."""
    check(q, k, v)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    (batch, heads, queries, width), (shared, slots) = q.shape, k.shape[1:3]
    group_heads = heads // shared
    mask_bytes = None if padding_mask is None else _as_bytes(padding_mask, q.device)
    out = torch.empty(batch, queries, heads, width, dtype=dtype, device=q.device)
    reach = _EVERYTHING if window is None else window
    q_strides = (q.stride(0), q.stride(1))
    mask_stride = 0 if mask_bytes is None else mask_bytes.stride(0)
    steps = (_steps(k), _steps(v))
    assert new is None or (queries == 1 and past is not None and kv_rows.is_rows(k))
    kv_mask_strides = (*k.stride()[:3], *v.stride()[:3], mask_stride)
    if queries > 1:
        shape = blocks_for(queries, q.dtype, tuning, codes=kv_rows.is_rows(k))
        launch(
            kernels.prefill, (-(-queries // shape.rows), heads, batch),
            q, k, v, *steps, mask_bytes, past, starts, out, slots, queries, reach, slots,
            *q_strides, q.stride(2), *kv_mask_strides,
            GROUP_HEADS=group_heads, D=width, QUERIES=shape.rows, COLUMNS=shape.columns, STAGES=shape.stages,
            num_warps=shape.warps,
        )  # fmt: skip
        return out
    shape = blocks_for(1, q.dtype, tuning)
    # In the interpreter 4 multiprocessors are enough to split columns.
    wanted = tuning.blocks_per_sm * multiprocessors(q.device, interpreted=4)
    splits = splits_for(batch * shared, slots, shape.columns, wanted)
    sums = torch.empty(batch, heads, splits, width, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, batch, heads, splits, dtype=torch.float32, device=q.device)
    assert arrivals is None or arrivals.numel() >= batch * shared
    launch(
        kernels.split, (shared, splits, batch),
        q, k, v, *steps, *(new or (None, None)), mask_bytes, past, starts, sums, peaks, totals,
        None if arrivals is None else out, arrivals, slots, reach, slots, splits,
        *q_strides, *kv_mask_strides,
        GROUP_HEADS=group_heads, ROWS=max(SMALLEST_TILE, power_of_2(group_heads)), D=width,
        COLUMNS=shape.columns, STAGES=shape.stages,
        PARTS=1 if arrivals is None else power_of_2(splits), num_warps=shape.warps, **dependency(dependent),
    )  # fmt: skip
    if arrivals is not None:
        return out
    launch(
        kernels.merge, (batch * heads,), sums, peaks, totals, out, splits,
        PARTS=power_of_2(splits), D=width, num_warps=4,
    )  # fmt: skip
    return out


def _as_bytes(padding_mask: Tensor, device: torch.device) -> Tensor:
    return padding_mask.to(device).contiguous().view(torch.uint8)


def _steps(rows: Tensor) -> Tensor | None:
    """Rows of codes as float32, in which their steps lie; None of numbers."""
    if not kv_rows.is_rows(rows):
        return None
    assert rows.stride(2) == rows.shape[3]
    return rows.view(torch.float32)
