"""NF4 on the CPU beside bitsandbytes: seconds to quantize and to dequantize one matrix.

    python -m qmix.evals.timing.nf4_speed [--rows 14336] [--columns 4096] [--rounds 5]

The two take turns and each keeps its best round, so that other load on the machine affects them
alike. Quantizing is measured in wall time, dequantizing in processor time. A ratio above 1 means
that qmix is faster. bitsandbytes must be installed. Knows nothing of models.
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

from qmix.evals import markdown
from qmix.formats.layouts import bnb
from qmix.weights import nf4

Clock = Callable[[], float]


@dataclass(frozen=True)
class Nf4Timing:
    """The best seconds of both."""

    what: str
    qmix: float
    bitsandbytes: float

    @property
    def ratio(self) -> float:
        """How many times as fast qmix is."""
        return self.bitsandbytes / self.qmix


def time_both(
    what: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, clock: Clock
) -> Nf4Timing:
    """Time two functions that do the same work, in turns."""
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for index, function in enumerate((ours, theirs)):
            gc.collect()
            begun = clock()
            function()
            best[index] = min(best[index], clock() - begun)
    return Nf4Timing(what, *best)


def time_nf4(rows: int, columns: int, rounds: int) -> list[Nf4Timing]:
    """Quantize and dequantize random weights [rows, columns] in blocks of 64 with plain absmax.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    theirs: Any = _bitsandbytes()
    weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    half = weight.bfloat16()
    timings = [
        time_both(
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
        timings.append(
            time_both(
                f"dequantize to {dtype}".replace("torch.", ""),
                lambda ours=ours, dtype=dtype: ours.dequantize(dtype),  # type: ignore[misc]
                lambda codes=codes, state=state: theirs.dequantize_4bit(codes, state),  # type: ignore[misc]
                rounds,
                time.process_time,
            )
        )
    return timings


def _bitsandbytes() -> Any:
    with warnings.catch_warnings():
        # torch's own compiler, imported by bitsandbytes, uses a decorator that torch has
        # deprecated.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
        return importlib.import_module("bitsandbytes.functional")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m qmix.evals.timing.nf4_speed", description=__doc__
    )
    for name, default in (("rows", 14336), ("columns", 4096), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    options = parser.parse_args(arguments)
    rows = [
        (each.what, f"{each.qmix:.3f}", f"{each.bitsandbytes:.3f}", f"{each.ratio:.3g}")
        for each in time_nf4(options.rows, options.columns, options.rounds)
    ]
    sys.stdout.write(markdown.table(("what", "qmix s", "bitsandbytes s", "ratio"), rows))


if __name__ == "__main__":
    main()
