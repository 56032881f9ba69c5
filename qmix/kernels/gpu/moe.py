"""Products with packed weights on a GPU: which program, how many of them, in which shape.

Up to DECODE_TOKENS tokens a column of a tile is a token, above that tokens are sorted by expert on
the device, and above `Tuning.dense_tokens` a matrix is dequantized into scratch and multiplied by
torch. Up to there no call waits for the device, and the same arguments give the same bits: partial
sums are added in a fixed order.

Shape letters: T tokens, k choices of a token, P = T * k pairs, E experts, D hidden width, F expert
width, N outputs, K inputs, S splits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.kernels.gpu import moe_triton
from qmix.kernels.moe import DECODE_TOKENS, Routes
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.table import ExpertTable
from qmix.weights.packed.tile_format import BYTE_ROWS, PANEL, TileFormat

# Between the two products activations are float16, which ends at 65504 and loses bits below 6e-5.
# Kept times 2^-2 they reach 262000 (beyond, the result is infinite, not clamped) and are closer than
# bfloat16's rounding as long as the others of their token are above 1e-4.
SHRINK = 2.0**-2

_LARGEST_SPLIT = 16


@dataclass(frozen=True)
class Tuning:
    """What only measuring decides. The defaults are reasoned, not measured.

    Attributes:
        warps: of a program, 1, 2 or 4: it owns 32 rows a warp. Fewer make more, smaller programs.
        stages: tiles in flight; None is four while three programs fit the shared memory of a
            multiprocessor, else three.
        blocks_per_sm: as many a multiprocessor are wanted; K is split until there are.
        dense_tokens: above this many, matrices are dequantized. By arithmetic the tiles lose to
            that from 1300 tokens on on an H100, from 2700 on an A100.
    """

    warps: Literal[1, 2, 4] = 4
    stages: int | None = None
    blocks_per_sm: int = 3
    dense_tokens: int = 1024


UNTUNED = Tuning()


@dataclass(frozen=True)
class Config:
    """The shape of a program: this many tokens, 16 byte rows a warp, this many tiles in flight."""

    columns: int
    warps: int
    stages: int


def columns_for(tokens: int, *plans: TileFormat) -> int:
    """Columns of programs that multiply about this many tokens by matrices of these formats.

    Wider ones would not fit the registers (python -m qmix.evals.aot): 128 columns spill, and 64 do
    with tiles of 128 inputs or with zeros.
    """
    widest = 64 if all(plan.symmetric and plan.inputs == 64 for plan in plans) else 32
    return next((columns for columns in (8, 16, 32) if tokens <= columns), widest)


def config_for(columns: int, plan: TileFormat, tuning: Tuning = UNTUNED) -> Config:
    """The shape of programs with this many columns."""
    stages = 4 if columns * plan.inputs <= 2048 else 3
    return Config(columns, tuning.warps, tuning.stages or stages)


def configs(plan: TileFormat, tuning: Tuning = UNTUNED) -> Iterator[Config]:
    """Every config that can be chosen for a tile format."""
    for columns in (8, 16, 32, 64):
        if columns <= columns_for(columns, plan):
            yield config_for(columns, plan, tuning)


@dataclass(frozen=True, eq=False)
class _Groups:
    """Pairs sorted by expert; of few tokens nothing needs sorting and the tensors are placeholders.

    Attributes:
        order: int32 [P], the pairs (token * k + choice) in ascending order of expert.
        starts: int32 [E + 1], where each expert's pairs start in `order`.
        blocks: int32 [E + 1], where its blocks start among all blocks of `columns` pairs.
        turns: blocks, or experts, at most.
        columns: tokens, or pairs, a program.
    """

    order: Tensor
    starts: Tensor
    blocks: Tensor
    turns: int
    is_sorted: bool
    columns: int


def experts(
    x: Tensor, routes: Routes, table: ExpertTable, layer: int, tuning: Tuning = UNTUNED
) -> Tensor:
    """`sum_k weight_k * w2(silu(w1 x) * w3 x)` from packed experts: [T, D] -> [T, D] in x's dtype."""
    if x.shape[0] > tuning.dense_tokens:
        return _dense_experts(x, routes, table, layer)
    partials = expert_partials(x.to(torch.float16), routes, table, layer, tuning)
    return _combine(partials, len(x), routes.ids.shape[1], x.dtype)


def expert_partials(
    x: Tensor, routes: Routes, table: ExpertTable, layer: int, tuning: Tuning = UNTUNED
) -> Tensor:
    """Shares of the sum that `experts` gives, float32 [S, P, D], of float16 activations [T, D].

    A token's output is the sum over its choices and the splits, in that order.
    """
    assert x.dtype == torch.float16, x.dtype
    (tokens, hidden), choices = x.shape, routes.ids.shape[1]
    pairs, width = tokens * choices, table.shape[0] // 2
    addresses = table.addresses[layer]
    groups = _group(routes.ids, table)
    shared = {"CHOICES": choices, "E": len(addresses), "SORTED": groups.is_sorted}
    ids, weights = routes.ids.contiguous(), routes.weights.contiguous()
    plan = (groups.order, groups.starts, groups.blocks)

    config = config_for(groups.columns, table.gate_up, tuning)
    x16, sharing = x.contiguous(), choices
    if table.perm is not None:  # act-order: a row for each pair, in its expert's order
        orders = table.perm[layer].index_select(0, ids.reshape(-1)).long()
        x16, sharing = x16.repeat_interleave(choices, 0).gather(1, orders), 1
    inner = torch.empty(pairs, width, dtype=torch.float16, device=x.device)
    moe_triton.gate_up[(width // BYTE_ROWS * (4 // config.warps), groups.turns)](
        addresses, x16, inner, ids, *plan, tokens, hidden, width,
        **_constants(table.gate_up, config), **shared, SHRINK=SHRINK, SHARED=sharing,
    )  # fmt: skip
    config = config_for(groups.columns, table.down, tuning)
    rows = hidden // PANEL * (4 // config.warps)
    wanted = tuning.blocks_per_sm * _multiprocessors(x.device)
    splits = splits_for(rows * groups.turns, width // table.down.inputs, wanted)
    partials = torch.empty(splits, pairs, hidden, dtype=torch.float32, device=x.device)
    moe_triton.down[(rows, groups.turns, splits)](
        addresses, table.down_offset, inner, partials, ids, weights, *plan, tokens, hidden, width, splits,
        **_constants(table.down, config), **shared, GROW=1 / SHRINK,
    )  # fmt: skip
    return partials


def linear(x: Tensor, weight: PackedMatrix, tuning: Tuning = UNTUNED) -> Tensor:
    """`x @ weight.T`: [..., K] -> [..., N] in x's dtype."""
    out_features, in_features = weight.shape
    rows = x.reshape(-1, in_features)
    if len(rows) > tuning.dense_tokens:
        if weight.perm is not None:
            rows = rows.index_select(1, weight.perm)
        return F.linear(rows, dequantize(weight, x.dtype)).view(*x.shape[:-1], out_features)
    partials = linear_partials(rows.to(torch.float16), weight, tuning)
    return _combine(partials, len(rows), 1, x.dtype).view(*x.shape[:-1], out_features)


def linear_partials(x: Tensor, weight: PackedMatrix, tuning: Tuning = UNTUNED) -> Tensor:
    """Shares of `x @ weight.T`, float32 [S, T, N], of float16 activations [T, K]: their sum is it."""
    assert x.dtype == torch.float16, x.dtype
    (out_features, in_features), plan = weight.shape, weight.format
    tokens = len(x)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    config = config_for(columns_for(tokens, plan), plan, tuning)
    panels = out_features // PANEL * (4 // config.warps)
    turns = -(-tokens // config.columns)
    wanted = tuning.blocks_per_sm * _multiprocessors(x.device)
    splits = splits_for(panels * turns, in_features // plan.inputs, wanted)
    partials = torch.empty(splits, tokens, out_features, dtype=torch.float32, device=x.device)
    moe_triton.packed_matmul[(panels, turns, splits)](
        weight.blob, x.contiguous(), partials, tokens, out_features, in_features, splits,
        **_constants(plan, config),
    )  # fmt: skip
    return partials


def dequantize(weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """A packed matrix of its own (not w1 and w3) as [N, K], inputs as they are packed."""
    address = torch.tensor([weight.blob.data_ptr()], device=weight.blob.device)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.blob.device)
    return _dequantize(address, 0, 0, weight.format, BYTE_ROWS, out)


def _dequantize(
    addresses: Tensor, expert: int, offset: int, plan: TileFormat, second: int, out: Tensor
) -> Tensor:
    rows, inputs = out.shape
    moe_triton.dequantize[(rows // PANEL, inputs // plan.inputs)](
        addresses, expert, offset, out, inputs, second, **_format(plan), num_warps=4
    )
    return out


def _dense_experts(x: Tensor, routes: Routes, table: ExpertTable, layer: int) -> Tensor:
    """An expert at a time through scratch of its own size. The host waits once, for the counts."""
    (tokens, hidden), choices = x.shape, routes.ids.shape[1]
    width = table.shape[0] // 2
    addresses = table.addresses[layer]
    order = routes.ids.reshape(-1).argsort(stable=True)
    counts = _counts(routes.ids, len(addresses)).tolist()
    gate_up, down = x.new_empty(2 * width, hidden), x.new_empty(hidden, width)
    out = torch.empty(tokens * choices, hidden, dtype=torch.float32, device=x.device)
    weights = routes.weights.reshape(-1, 1)
    first = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        pairs = order[first : first + count]
        first += count
        _dequantize(addresses, expert, 0, table.gate_up, width, gate_up)
        _dequantize(addresses, expert, table.down_offset, table.down, BYTE_ROWS, down)
        chosen = x[pairs // choices]
        if table.perm is not None:
            chosen = chosen.index_select(1, table.perm[layer, expert])
        gate, up = F.linear(chosen, gate_up).chunk(2, -1)
        out[pairs] = F.linear(F.silu(gate) * up, down).float() * weights[pairs]
    return out.view(tokens, choices, hidden).sum(1).to(x.dtype)


def _combine(partials: Tensor, tokens: int, choices: int, dtype: torch.dtype) -> Tensor:
    """Sum float32 [S, P, N] over splits and choices: [T, N]."""
    splits, pairs, width = partials.shape
    out = torch.empty(tokens, width, dtype=dtype, device=partials.device)
    block = 512
    moe_triton.combine[(tokens, -(-width // block))](
        partials, out, pairs, width, SPLITS=splits, CHOICES=choices, BLOCK=block, num_warps=4
    )
    return out


def _group(ids: Tensor, table: ExpertTable) -> _Groups:
    """How pairs [T, k] are dealt to programs. Nothing here waits for the device."""
    tokens, pairs, count = len(ids), ids.numel(), table.addresses.shape[1]
    plans = (table.gate_up, table.down)
    if tokens <= DECODE_TOKENS:
        none = ids.new_empty(0, dtype=torch.int32)
        return _Groups(none, none, none, min(count, pairs), False, columns_for(tokens, *plans))
    columns = columns_for(-(-pairs // count), *plans)
    counts = _counts(ids, count)
    blocks = (counts + columns - 1) // columns
    starts, block_starts = (F.pad(part.cumsum(0), (1, 0)).int() for part in (counts, blocks))
    order = ids.reshape(-1).argsort(stable=True).int()
    turns = pairs // columns + min(count, pairs)  # every expert may have one block half full
    return _Groups(order, starts, block_starts, turns, True, columns)


def _counts(ids: Tensor, count: int) -> Tensor:
    """int64 [E]: pairs of each expert. (`bincount` waits for the device.)"""
    return (ids.reshape(-1, 1) == torch.arange(count, device=ids.device)).sum(0)


def _format(plan: TileFormat) -> dict[str, object]:
    return {"KIND": plan.kind, "C": plan.inputs, "SYMMETRIC": plan.symmetric}


def _constants(plan: TileFormat, config: Config) -> dict[str, object]:
    shape = {"WARPS": config.warps, "COLUMNS": config.columns, "STAGES": config.stages}
    return {**_format(plan), **shape, "num_warps": config.warps}


def splits_for(unsplit: int, tiles: int, wanted: int) -> int:
    """Splits of K that make `unsplit` programs at least `wanted`: a power of two, four tiles each."""
    splits = 1
    while splits < _LARGEST_SPLIT and splits * unsplit < wanted and 8 * splits <= tiles:
        splits *= 2
    return splits


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: enough for K to be split
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count
