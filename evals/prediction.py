"""What a decode step should take on a GPU, launch by launch: a prediction, never a measurement.

    python -m qmix.evals.prediction

For one row of the 8x7B with an empty cache, as it was launched before products did what lies
between them (nine launches a layer, blocks of four warps, the device waiting for the host after
each token), as it is now, and with dependent launches. The bound is planning.roofline's: the same
bytes over the same bandwidth, and nothing else. Needs no GPU, and imports no torch.

The time of a launch is its gap and its ramp; what it streams, for which memory and the integer pipe
take turns where they do not overlap; what one block reads alone; and what its last block does.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qmix.evals import markdown
from qmix.kernels.gpu.grid import balance, grid_for
from qmix.planning import gpus
from qmix.planning.roofline import Rate, Rates, StepCost
from qmix.weights.packed.tile_format import PANEL, TileFormat

FORMATS = {"NF4": TileFormat("nf4", 64), "Int4 g128": TileFormat("int4", 128)}
LAYERS, HIDDEN, WIDTH, QKV, EXPERTS, CHOSEN, VOCABULARY = 32, 4096, 14336, 6144, 8, 2, 32000

# Multiprocessors, and the clock in Hz: the data sheets' boost clock, but for the H100 and H200 the
# 1.755 GHz that they are assumed to hold under load.
DEVICES: Mapping[str, tuple[int, float]] = {
    "A100-80": (108, 1.41e9),
    "H100": (132, 1.755e9),
    "H200": (132, 1.755e9),
    "RTX 4090": (128, 2.52e9),
}
# Instructions a weight of the loop over weights, as compiled for sm_80 to sm_90 (qmix.evals.aot):
# all, and those that the integer pipe executes (PRMT, LOP3, SHF, IADD).
INSTRUCTIONS = {"NF4": (3.5, 2.6), "Int4 g128": (2.0, 0.86)}
_INTEGER_LANES = 64  # of a multiprocessor, a clock (CUDA C++ programming guide)
# Seconds, all of them assumed. Gap: between the nodes of a graph, as others report it. Ramp: until
# the first bytes arrive and the last block has drained. Finish: an arrival and a read of what other
# blocks stored. The host: a blocking copy, detokenizing, printing and the next launch.
_GAP, _RAMP, _FINISH, _HOST = 1.3e-6, 1.5e-6, 1.5e-6, 135e-6
_DEPENDENT = 0.5  # the share of gap and ramp that remains where the next launch starts early
_UNSHARED = 0.2  # of the shorter of memory and integer pipe, what does not overlap with the longer
_BLOCK_BYTES = 64  # a clock, that one multiprocessor reads from the second-level cache

Way = Literal["before", "now", "dependent"]


@dataclass(frozen=True)
class Launch:
    """One launch of a layer.

    Attributes:
        bytes: of packed weights that it reads. weights: how many these are.
        even: the share of the multiprocessors' time that its blocks use.
        alone: bytes that a single block reads.
        finishes: arrivals after which a last block goes on.
    """

    name: str
    bytes: int = 0
    weights: int = 0
    even: float = 1.0
    alone: int = 0
    finishes: int = 0


def launches(tile_format: TileFormat, multiprocessors: int, way: Way) -> list[Launch]:
    """The launches of a layer, in order."""

    def product(
        name: str, rows: int, inputs: int, groups: int = 1, splits: int = 1, finishes: int = 0
    ) -> Launch:
        """`splits`: those of before, where blocks had four warps."""
        blocks, tiles = rows // PANEL * groups, inputs // tile_format.inputs
        if way == "before":
            finishes = 0
        else:
            grid = grid_for(
                (rows, inputs), tile_format, groups=groups, columns=8,
                multiprocessors=multiprocessors,
            )  # fmt: skip
            blocks, splits = grid.rows * groups, grid.splits
            finishes = max(finishes, int(splits > 1))
        even = balance(blocks, splits, tiles, multiprocessors)
        read = groups * tile_format.matrix_bytes((rows, inputs))
        return Launch(name, read, groups * rows * inputs, even, finishes=finishes)

    shares = 16 * HIDDEN * 4  # float32 partial sums that a norm adds up
    qkv, o_proj = product("qkv", QKV, HIDDEN, 1, 16, 1), product("o_proj", HIDDEN, HIDDEN, 1, 16, 2)
    gate_up = product("gate_up", 2 * WIDTH, HIDDEN, CHOSEN, 1)
    down = product("down", HIDDEN, WIDTH, CHOSEN, 8, 1)
    if way != "before":
        return [qkv, Launch("split", finishes=1), o_proj, gate_up, down]
    return [
        Launch("residual_norm", alone=shares),
        qkv,
        Launch("rotate_store"),
        Launch("split"),
        Launch("merge"),
        o_proj,
        Launch("residual_norm_route", alone=shares + EXPERTS * HIDDEN * 2),
        gate_up,
        down,
    ]


def seconds(launch: Launch, card: str, kind: str, way: Way) -> float:
    """The predicted time of a launch."""
    multiprocessors, clock = DEVICES[card]
    memory = launch.bytes / gpus.find(card).read_bandwidth
    integer = launch.weights * INSTRUCTIONS[kind][1] / (multiprocessors * _INTEGER_LANES * clock)
    stream = max(memory, integer) + _UNSHARED * min(memory, integer)
    fixed = (_GAP + _RAMP) * (_DEPENDENT if way == "dependent" else 1.0)
    alone = launch.alone / (_BLOCK_BYTES * clock)
    return fixed + stream / launch.even + alone + launch.finishes * _FINISH


def tokens_per_s(card: str, kind: str, way: Way) -> float:
    """Decoded tokens a second of one row."""
    layer = launches(FORMATS[kind], DEVICES[card][0], way)
    head = 2 * VOCABULARY * HIDDEN / gpus.find(card).read_bandwidth + 4 * (_GAP + _RAMP)
    host = _HOST if way == "before" else 0.0
    return 1 / (LAYERS * sum(seconds(each, card, kind, way) for each in layer) + head + host)


def bound(card: str, kind: str) -> float:
    """Tokens a second if reading were all: planning.roofline over the bytes of these launches."""
    read = {each.name: each.bytes for each in launches(FORMATS[kind], DEVICES[card][0], "now")}
    expert = (read["gate_up"] + read["down"]) / CHOSEN
    dense = LAYERS * (read["qkv"] + read["o_proj"]) + 2 * VOCABULARY * HIDDEN
    step = StepCost(dense=dense, activations=CHOSEN * LAYERS, expert=expert, hit=1.0, layers=LAYERS)
    rate = Rate(gpus.find(card).read_bandwidth, "data sheet")
    return 1 / step.seconds("resident", Rates(device=rate, interconnect=rate, host=rate, disk=rate))


def launch_table() -> str:
    """Every launch of a layer on an H100 with its bytes, instructions and predicted time."""
    card, rows = "H100", []
    ways: tuple[Way, ...] = ("before", "now")
    for way in ways:
        found = {kind: launches(each, DEVICES[card][0], way) for kind, each in FORMATS.items()}
        for index, launch in enumerate(found["NF4"]):
            cells = [way if not index else "", launch.name]
            for kind in FORMATS:
                each = found[kind][index]
                read = f"{each.bytes / 1e6:.1f}" if each.bytes else "-"
                cells += [read, f"{1e6 * seconds(each, card, kind, way):.1f}"]
            rows.append(cells)
        totals = [
            f"{1e6 * sum(seconds(each, card, kind, way) for each in found[kind]):.0f}"
            for kind in FORMATS
        ]
        sizes = [f"{sum(each.bytes for each in found[kind]) / 1e6:.0f}" for kind in FORMATS]
        count = f"together, {len(found['NF4'])} launches"
        rows.append(["", count, sizes[0], totals[0], sizes[1], totals[1]])
    header = ["", f"a layer, {card}", "NF4, MB", "µs", "Int4 g128, MB", "µs"]
    return markdown.table(header, rows)


def speed_table() -> str:
    """Predicted tokens a second of each card and format."""
    rows = []
    for card in DEVICES:
        for kind in FORMATS:
            found = [tokens_per_s(card, kind, way) for way in ("before", "now", "dependent")]
            top = bound(card, kind)
            cells = [f"{value:.0f} ({100 * value / top:.0f} %)" for value in found]
            rows.append([card, kind, f"{top:.0f}", *cells])
    header = ["predicted tok/s, one row", "", "bound", "before", "now", "with dependent launches"]
    return markdown.table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    argparse.ArgumentParser(prog="python -m qmix.evals.prediction", description=__doc__).parse_args(
        arguments
    )
    loops = ", ".join(
        f"{kind} {every} instructions a weight, {integer} of them on the integer pipe"
        for kind, (every, integer) in INSTRUCTIONS.items()
    )
    sys.stdout.write(
        f"A prediction; nothing here was measured.\n{loops}\n\n{launch_table()}\n{speed_table()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
