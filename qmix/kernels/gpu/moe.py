"""Matmuls with packed weights on a GPU: which Triton kernel runs, in which thread blocks.

Up to DECODE_TOKENS tokens, every column of a tile is a token. Above that, pairs of token and expert
are sorted by expert on the device, and above `Tuning.dense_tokens` a matrix is dequantized into
scratch and multiplied by torch. Only the last case may wait for the device. The same arguments give
the same bits: partial sums are added in a fixed order.

Shape letters: see qmix.kernels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix.kernels.gpu import moe_triton
from qmix.kernels.gpu.grid import UNTUNED, Config, Grid, Tuning, columns_for, grid_for, roomy
from qmix.kernels.gpu.launch import dependency, launch, multiprocessors, power_of_2
from qmix.kernels.moe import DECODE_TOKENS, Routes
from qmix.weights.packed.layout import PackedMatrix
from qmix.weights.packed.table import ExpertTable, TableForm
from qmix.weights.packed.tile_format import BYTE_ROWS, PANEL, TileFormat

# Between the two matmuls of an expert activations are float16, which ends at 65504 and loses bits
# below 6e-5. Multiplied by 2^-2 they reach 262000 (larger ones become infinite, they are not
# clamped), and their error stays below that of bfloat16 as long as the token has values above 1e-4.
SHRINK = 2.0**-2
COMBINED = 512  # outputs of a block that adds up splits and choices


@dataclass(frozen=True, eq=False)
class _Groups:
    """Groups of pairs with the same expert, one for each thread block along the grid's second axis.

    With few tokens nothing is sorted: a group is an expert, and the tensors are placeholders.

    Attributes:
        order: int32 [M], the pairs (token * k + choice) in ascending order of expert.
        starts: int32 [E + 1], where the pairs of each expert start in `order`.
        blocks: int32 [E + 1], the first group of each expert.
        count: an upper bound on the number of groups.
        columns: the most pairs of a group.
    """

    order: Tensor
    starts: Tensor
    blocks: Tensor
    count: int
    is_sorted: bool
    columns: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernels take them."""
        return self.order, self.starts, self.blocks


@dataclass(frozen=True, eq=False)
class Finish:
    """A kernel that multiplies and whose last block of a panel then does more.

    Attributes:
        kernel: takes the arguments of the plain product's, then `arguments`.
        constants: more than the plain product's.
    """

    kernel: Any
    arguments: tuple[object, ...]
    constants: Mapping[str, object]


FinishFor = Callable[[Grid], Finish]
_GroupedFn = Callable[[TableForm], tuple[Tensor, _Groups]]


def experts(
    x: Tensor, routes: Routes, table: ExpertTable, layer: int, tuning: Tuning = UNTUNED
) -> Tensor:
    """`sum_k weight_k * w2(silu(w1 x) * w3 x)`, packed: [T, D] -> [T, D] in x's dtype."""
    if x.shape[0] > tuning.dense_tokens:
        return _dense_experts(x, routes, table, layer)
    partials = expert_partials(x.to(torch.float16), routes, table, layer, tuning)
    return _combine(partials, len(x), routes.ids.shape[1], x.dtype)


def expert_partials(
    x: Tensor,
    routes: Routes,
    table: ExpertTable,
    layer: int,
    tuning: Tuning = UNTUNED,
    down_tuning: Tuning | None = None,
    *,
    squares: Tensor | None = None,
    finish: FinishFor | None = None,
    arrivals: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """The partial sums of `experts`: float16 activations [T, D] -> float32 [Z, M, D].

    The output of a token is the sum over its choices and over the splits, in that order.

    Args:
        down_tuning: of the second product, if it is another.
        squares: float32 [T, S], shares of the mean square that x is still to be divided by the root
            of.
        finish: what `down` is replaced by; at most DECODE_TOKENS tokens.
        arrivals: int32 zeros [E * grid.most_blocks] on the device, and zeros again after: w1 and
            w3 are split too where that occupies the device more evenly.
        dependent: `gate_up` may start while the launch before drains, see `can_depend`; not where
            torch sorts the pairs in between.
    """
    assert x.dtype == torch.float16, x.dtype
    grouped = _grouped(routes.ids, table)
    inner = _gate_up(x, routes, table, layer, grouped, tuning, squares, arrivals, dependent)
    return _down(inner, x.shape, routes, table, layer, grouped, down_tuning or tuning, finish)


def _down(
    x: Tensor,
    shape: torch.Size,
    routes: Routes,
    table: ExpertTable,
    layer: int,
    grouped: _GroupedFn,
    tuning: Tuning,
    finish: FinishFor | None,
) -> Tensor:
    """Partial sums [Z, M, D] for float16 [M, F], of tokens [T, D] = `shape`."""
    (pairs, width), (tokens, hidden) = x.shape, shape
    parts = [(form, *grouped(form)) for form in table.down]
    grids = [
        _grid((hidden, width), form.format, groups, x.device, tuning) for form, _, groups in parts
    ]
    splits = min(grid.splits for grid in grids)
    partials = torch.empty(splits, pairs, hidden, dtype=torch.float32, device=x.device)
    for part, (form, ids, groups) in enumerate(parts, 1):
        grid = replace(grids[part - 1], splits=splits)
        is_last = part == len(parts)
        how = finish(grid) if finish and is_last else Finish(moe_triton.down, (), {})
        launch(
            how.kernel, (grid.rows, groups.count, splits),
            form.at(layer), form.offset, x, partials, ids,
            routes.weights.contiguous(), *groups.tensors, tokens, hidden, width, splits,
            *how.arguments, **_constants(form.format, grid.config), **_choice(routes, table, groups),
            **how.constants, GROW=1 / SHRINK,
        )  # fmt: skip
    return partials


def _gate_up(
    x: Tensor,
    routes: Routes,
    table: ExpertTable,
    layer: int,
    grouped: _GroupedFn,
    tuning: Tuning,
    squares: Tensor | None,
    arrivals: Tensor | None,
    dependent: bool,
) -> Tensor:
    """`SHRINK * silu(w1 x) * w3 x` of each pair: [T, D] -> float16 [M, F]."""
    (tokens, hidden), choices = x.shape, routes.ids.shape[1]
    pairs, width = tokens * choices, table.shape[0] // 2
    x16, sharing = x.contiguous(), choices
    if table.perm is not None:  # act-order: one row for each pair, in the order of its expert
        orders = table.perm[layer].index_select(0, routes.ids.reshape(-1)).long()
        x16, sharing = x16.repeat_interleave(choices, 0).gather(1, orders), 1
    inner = torch.empty(pairs, width, dtype=torch.float16, device=x.device)
    for form in table.gate_up:
        ids, groups = grouped(form)
        may_split = arrivals is not None and not groups.is_sorted
        limits = {} if may_split else {"most_splits": 1}
        grid = _grid(table.shape, form.format, groups, x.device, tuning, **limits)
        merged: tuple[Tensor | None, Tensor | None] = (None, None)
        if grid.splits > 1:
            tile = 2, grid.config.warps * 16 * groups.columns
            shape = (grid.splits, groups.count, grid.rows, *tile)
            merged = torch.empty(shape, dtype=torch.float32, device=x.device), arrivals
        launch(
            moe_triton.gate_up, (grid.rows, groups.count, grid.splits),
            form.at(layer), x16, inner, *merged, ids, *groups.tensors, squares,
            tokens, hidden, width, grid.splits,
            **_constants(form.format, grid.config), **_choice(routes, table, groups),
            **slices(squares), **dependency(dependent and not groups.is_sorted),
            **roomy(grid.config), SHRINK=SHRINK, SHARED=sharing,
        )  # fmt: skip
        dependent = False  # of the launches here only the first
    return inner


def _choice(routes: Routes, table: ExpertTable, groups: _Groups) -> dict[str, object]:
    experts = table.addresses.shape[1]
    return {"CHOICES": routes.ids.shape[1], "E": experts, "SORTED": groups.is_sorted}


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


def linear_partials(
    x: Tensor,
    weight: PackedMatrix,
    tuning: Tuning = UNTUNED,
    *,
    finish: FinishFor | None = None,
) -> Tensor:
    """The partial sums of `x @ weight.T`: float16 activations [T, K] -> float32 [Z, T, N].

    Args:
        finish: what `packed_matmul` is replaced by; at most DECODE_TOKENS tokens.
    """
    assert x.dtype == torch.float16, x.dtype
    (out_features, in_features), tile_format = weight.shape, weight.format
    tokens = len(x)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    columns = columns_for(tokens, tile_format)
    grid = grid_for(
        weight.shape, tile_format, groups=-(-tokens // columns), columns=columns,
        multiprocessors=_multiprocessors(x.device), tuning=tuning,
    )  # fmt: skip
    partials = torch.empty(grid.splits, tokens, out_features, dtype=torch.float32, device=x.device)
    how = Finish(moe_triton.packed_matmul, (), {}) if finish is None else finish(grid)
    launch(
        how.kernel, (grid.rows, -(-tokens // columns), grid.splits),
        weight.blob, x.contiguous(), partials, tokens, out_features, in_features, grid.splits,
        *how.arguments, **_constants(tile_format, grid.config), **how.constants,
    )  # fmt: skip
    return partials


def dequantize(weight: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """A packed matrix [N, K], inputs in their packed order; not that of w1 with w3."""
    address = torch.tensor([weight.blob.data_ptr()], device=weight.blob.device)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.blob.device)
    return _dequantize(address, 0, 0, weight.format, BYTE_ROWS, out)


def _dequantize(
    addresses: Tensor, expert: int, offset: int, tile_format: TileFormat, second: int, out: Tensor
) -> Tensor:
    rows, inputs = out.shape
    launch(
        moe_triton.dequantize, (rows // PANEL, inputs // tile_format.inputs),
        addresses, expert, offset, out, inputs, second, **format_constants(tile_format), num_warps=4,
    )  # fmt: skip
    return out


def _dense_experts(x: Tensor, routes: Routes, table: ExpertTable, layer: int) -> Tensor:
    """One expert at a time, dequantized into scratch. The host waits once, for the counts."""
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
        of, offset = table.formats[expert], table.down_offset(expert)
        _dequantize(addresses, expert, 0, of.gate_up, width, gate_up)
        _dequantize(addresses, expert, offset, of.down, BYTE_ROWS, down)
        chosen = x[pairs // choices]
        if table.perm is not None:
            chosen = chosen.index_select(1, table.perm[layer, expert])
        out[pairs] = _swiglu(chosen, gate_up, down).float().mul_(weights[pairs])
    return out.view(tokens, choices, hidden).sum(1).to(x.dtype)


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """An expert's output in little memory, since one expert may take a whole prompt: [T, D]."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate, inplace=True).mul_(up), down)


def _combine(partials: Tensor, tokens: int, choices: int, dtype: torch.dtype) -> Tensor:
    """Sum float32 [Z, M, N] over splits and choices: [T, N]."""
    splits, pairs, width = partials.shape
    out = torch.empty(tokens, width, dtype=dtype, device=partials.device)
    launch(
        moe_triton.combine, (tokens, -(-width // COMBINED)),
        partials, out, pairs, width, SPLITS=splits, CHOICES=choices, BLOCK=COMBINED, num_warps=4,
    )  # fmt: skip
    return out


def _grouped(ids: Tensor, table: ExpertTable) -> _GroupedFn:
    """What a form's launches multiply: the ids [T, k], E where it has no part, and its groups."""

    @cache
    def found(members: Tensor | None, count: int) -> tuple[Tensor, _Groups]:
        own = ids.contiguous() if members is None else members[ids]
        return own, _group(own, table, count)

    return lambda form: found(form.members, form.count)


def _group(ids: Tensor, table: ExpertTable, most: int) -> _Groups:
    """How pairs [T, k] are distributed to thread blocks. Nothing here waits for the device.

    Args:
        ids: E where a pair has no part.
        most: how many experts may have one.
    """
    tokens, pairs, count = len(ids), ids.numel(), table.addresses.shape[1]
    formats = [form.format for form in (*table.gate_up, *table.down)]
    if tokens <= DECODE_TOKENS:
        none = ids.new_empty(0, dtype=torch.int32)
        return _Groups(none, none, none, min(most, pairs), False, columns_for(tokens, *formats))
    columns = columns_for(-(-pairs // count), *formats)
    counts = _counts(ids, count)
    blocks = (counts + columns - 1) // columns
    starts, block_starts = (F.pad(part.cumsum(0), (1, 0)).int() for part in (counts, blocks))
    order = ids.reshape(-1).argsort(stable=True).int()
    groups = pairs // columns + min(most, pairs)  # the last group of an expert may be part full
    return _Groups(order, starts, block_starts, groups, True, columns)


def _counts(ids: Tensor, count: int) -> Tensor:
    """The pairs of each expert, int64 [E]. (`bincount` would wait for the device.)"""
    return (ids.reshape(-1, 1) == torch.arange(count, device=ids.device)).sum(0)


def slices(squares: Tensor | None) -> dict[str, object]:
    """The constants of `norm_factor` for shares [T, S]."""
    count = 1 if squares is None else squares.shape[1]
    return {"S": count, "SLICES": power_of_2(count)}


def format_constants(tile_format: TileFormat) -> dict[str, object]:
    return {
        "KIND": "table" if tile_format.own_table else tile_format.kind,
        "C": tile_format.inputs,
        "GROUP": tile_format.group_inputs,
        "SYMMETRIC": tile_format.symmetric,
    }


def _constants(tile_format: TileFormat, config: Config) -> dict[str, object]:
    shape = {"WARPS": config.warps, "COLUMNS": config.columns, "STAGES": config.stages}
    return {**format_constants(tile_format), **shape, "num_warps": config.warps}


def _grid(
    shape: tuple[int, int],
    tile_format: TileFormat,
    groups: _Groups,
    device: torch.device,
    tuning: Tuning,
    **limits: int,
) -> Grid:
    return grid_for(
        shape, tile_format, groups=groups.count, columns=groups.columns,
        multiprocessors=_multiprocessors(device), tuning=tuning, **limits,
    )  # fmt: skip


def _multiprocessors(device: torch.device) -> int:
    return multiprocessors(device, interpreted=2)  # enough to split K
