"""NF4 on the CPU beside bitsandbytes: seconds to quantize and to dequantize one matrix.

    python -m qmix.evals.timing.nf4_speed [--rows 14336] [--columns 4096] [--rounds 5]

Both take turns, and each keeps its best round, so that the machine's other work falls on both alike.
Quantizing is measured in wall time, dequantizing in processor time. A ratio above 1 means that qmix is
faster. bitsandbytes must be installed.
"""

import argparse
import gc
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qmix.formats.layouts import bnb
from qmix.quantize.rounding import nf4

Clock = Callable[[], float]


@dataclass(frozen=True)
class Comparison:
    """Best seconds of both."""

    what: str
    qmix: float
    bitsandbytes: float

    @property
    def ratio(self) -> float:
        """How many times as fast qmix is."""
        return self.bitsandbytes / self.qmix


def compare(
    what: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, clock: Clock
) -> Comparison:
    """Time both in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for index, function in enumerate((ours, theirs)):
            gc.collect()
            begun = clock()
            function()
            best[index] = min(best[index], clock() - begun)
    return Comparison(what, *best)


def run(rows: int, columns: int, rounds: int) -> list[Comparison]:
    """Quantize and dequantize random weights [rows, columns], blocks of 64, absmax not nested.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    theirs: Any = _bitsandbytes()
    weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    half = weight.bfloat16()
    found = [
        compare(
            "quantize bfloat16",
            lambda: nf4.quantize(half),
            lambda: theirs.quantize_4bit(half, blocksize=64, quant_type="nf4"),
            rounds,
            time.perf_counter,
        )
    ]
    for dtype in (torch.bfloat16, torch.float32):
        ours = replace(nf4.quantize(weight), out_dtype=dtype)
        packed = {n.removeprefix("p.weight."): t for n, t in bnb.pack(ours, "p").items()}
        codes = packed.pop("p.weight")
        state = theirs.QuantState.from_dict(packed, torch.device("cpu"))
        found.append(
            compare(
                f"dequantize to {dtype}".replace("torch.", ""),
                lambda ours=ours, dtype=dtype: ours.dequantize(dtype),  # type: ignore[misc]
                lambda codes=codes, state=state: theirs.dequantize_4bit(codes, state),  # type: ignore[misc]
                rounds,
                time.process_time,
            )
        )
    return found


def _bitsandbytes() -> Any:
    with warnings.catch_warnings():
        # torch's own compiler, imported by bitsandbytes, uses a decorator that torch has deprecated.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        return importlib.import_module("bitsandbytes.functional")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.timing.nf4_speed")
    for name, default in (("rows", 14336), ("columns", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    out = sys.stdout
    out.write("| what | qmix s | bitsandbytes s | ratio |\n|---|---|---|---|\n")
    for each in run(options.rows, options.columns, options.rounds):
        out.write(
            f"| {each.what} | {each.qmix:.3f} | {each.bitsandbytes:.3f} | {each.ratio:.2f} |\n"
        )


if __name__ == "__main__":
    main()
