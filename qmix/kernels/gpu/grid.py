"""How packed matmuls are cut into thread blocks: their shapes, their number, their splits of K.

Arithmetic only: knows neither torch nor triton. Shape letters: see qmix.kernels.
"""

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from qmix.weights.packed.tile_format import PANEL, TileFormat

# Multiprocessors that wait while others work cost at most 5 %.
EVEN = 0.95

# A split keeps so many tiles: what is in flight, and as many again.
_FEWEST_TILES = 4
LARGEST_SPLIT = 16
_PANEL_WARPS = 4
# Warps of a block by its columns, the usual number first; wider blocks have four. Four warps of 8
# columns would take 16 % more instructions where Triton 3.9 compiles them for sm_90: the matrix
# instruction of four warps wants fences and descriptors.
_USUAL_WARPS = {8: (2, 1), 16: (2,)}


@dataclass(frozen=True)
class Tuning:
    """Settings that only measurements can decide. The defaults are reasoned, not measured.

    Attributes:
        warps: warps of a thread block, 1, 2 or 4; each owns 32 rows. None: two for few tokens, so
            that there are many blocks, or one where that spreads them more evenly; else four.
        stages: tiles in flight; None means four while three blocks fit the shared memory of a
            multiprocessor, else three.
        warps_per_sm: the least number of warps for each multiprocessor; K is split until there are
            as many. Three tiles in flight in each of seven warps are 23 KB, which an H100 needs to
            reach its bandwidth.
        dense_tokens: above this many tokens matrices are dequantized. By arithmetic that beats the
            tiles from 1300 tokens on an H100 and from 2700 on an A100.
    """

    warps: Literal[1, 2, 4] | None = None
    stages: int | None = None
    warps_per_sm: int = 7
    dense_tokens: int = 1024


UNTUNED = Tuning()


@dataclass(frozen=True)
class Config:
    """The shape of a thread block: its tokens, its warps of 16 byte rows, its tiles in flight."""

    columns: int
    warps: int
    stages: int


def roomy(config: Config) -> Mapping[str, object]:
    """Compiler options that let a thread of a small block take 128 registers.

    For products with much to do after the loop. Left alone, the assembler keeps them to 64 or 80:
    it spills 16 bytes (Triton 3.7, sm_100), or computes addresses anew in each iteration (3.9,
    sm_86). 128 still are eight blocks of two warps a multiprocessor. Other blocks would spill.
    """
    return {"maxnreg": 128} if (config.columns, config.warps) == (8, 2) else {}


def columns_for(tokens: int, *formats: TileFormat) -> int:
    """The columns of blocks that multiply about this many tokens by matrices of these formats.

    Wider blocks would not fit the registers (python -m qmix.evals.aot): 128 columns spill, and so
    do 64 with tiles of 128 inputs, with zeros, or with codes of eight bits.
    """
    widest = 64 if all(map(_is_narrow, formats)) else 32
    return next((columns for columns in (8, 16, 32) if tokens <= columns), widest)


def _is_narrow(tile_format: TileFormat) -> bool:
    """Whether a tile takes so few registers that 64 columns have room beside it."""
    plain = tile_format.symmetric and tile_format.bits == 4 and not tile_format.group
    return plain and tile_format.inputs == 64


def configs_for(
    columns: int, tile_format: TileFormat, tuning: Tuning = UNTUNED
) -> tuple[Config, ...]:
    """The shapes of blocks with this many columns, the usual one first."""
    stages = 4 if columns * tile_format.inputs <= 2048 else 3
    usual = _USUAL_WARPS.get(columns, (4,))
    warps = usual if tuning.warps is None else (tuning.warps,)
    return tuple(Config(columns, count, tuning.stages or stages) for count in warps)


def configs(tile_format: TileFormat, tuning: Tuning = UNTUNED) -> Iterator[Config]:
    """Every shape that can be chosen for a tile format."""
    for columns in (8, 16, 32, 64):
        if columns <= columns_for(columns, tile_format):
            yield from configs_for(columns, tile_format, tuning)


@dataclass(frozen=True)
class Grid:
    """The thread blocks of one matmul.

    Attributes:
        config: the shape of a block.
        rows: how many blocks the matrix's rows take, the first axis.
        splits: the parts of K, the third axis.
    """

    config: Config
    rows: int
    splits: int


@cache
def grid_for(
    shape: tuple[int, int],
    tile_format: TileFormat,
    *,
    groups: int,
    columns: int,
    multiprocessors: int,
    tuning: Tuning = UNTUNED,
    most_splits: int = LARGEST_SPLIT,
) -> Grid:
    """The thread blocks of a matrix [N, K].

    The first choice with enough warps that is spread evenly, else the one that uses the largest
    share of the multiprocessors' time.

    Args:
        groups: how many groups of columns there are, the second axis.
        most_splits: 1 where K cannot be split.
    """
    tiles, wanted = shape[1] // tile_format.inputs, tuning.warps_per_sm * multiprocessors
    best, found = 0.0, None
    for config in configs_for(columns, tile_format, tuning):
        rows = shape[0] // PANEL * (_PANEL_WARPS // config.warps)
        for splits in range(1, most_splits + 1):
            if splits > 1 and splits * _FEWEST_TILES > tiles:
                break
            filled = min(1.0, rows * groups * splits * config.warps / wanted)
            share = filled * balance(rows * groups, splits, tiles, multiprocessors)
            if share > best:
                best, found = share, Grid(config, rows, splits)
            if filled == 1.0 and share >= EVEN:
                return Grid(config, rows, splits)
    assert found is not None, "a matrix has at least one block"
    return found


def most_blocks(shape: tuple[int, int]) -> int:
    """The most blocks that the rows of a matrix [N, K] take, whatever their shape."""
    return shape[0] // PANEL * _PANEL_WARPS


def balance(blocks: int, splits: int, tiles: int, multiprocessors: int) -> float:
    """How evenly blocks of `splits` parts of K occupy the multiprocessors: mean over most tiles.

    Each block goes to the multiprocessor that has the fewest tiles so far, in the order in which a
    GPU starts them.
    """
    if tiles % splits == 0:  # equal parts, dealt in turn
        count = blocks * splits
        return count / (multiprocessors * -(-count // multiprocessors))
    loads = [0] * multiprocessors
    for split in range(splits):
        work = (split + 1) * tiles // splits - split * tiles // splits
        for _ in range(blocks):
            heapq.heapreplace(loads, loads[0] + work)
    return blocks * tiles / (multiprocessors * max(loads))
