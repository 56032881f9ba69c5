"""Experts of true width in every layout on this CPU: bits, loading, memory, and one token's time.

`python -m qmix.evals.layouts [--json FILE]` writes two random experts in each layout, reads them as
a model does, and multiplies one token by both. A token's time is compared with NF4's, turn by turn.
Other programs may use the machine: times are the least of several. Reading is from the page cache,
so it measures the bytes' way from there to the weight, which some layouts reorder.
"""

import argparse
import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.errors import ResourceError
from qmix.evals import markdown
from qmix.evals.command import command_line, exit_code, publish, say
from qmix.evals.timing import stored_experts
from qmix.evals.timing.bandwidth import seconds
from qmix.evals.timing.stored_experts import LAYOUTS, Stored, write_experts
from qmix.experts.reader import ExpertReader
from qmix.formats import open_checkpoint
from qmix.kernels import Routes
from qmix.kernels.cpu.library import library
from qmix.planning import machine
from qmix.planning.process_memory import peak_resident_bytes, resident_bytes
from qmix.weights.expert import Expert

NF4 = "NF4"
_CPU = torch.device("cpu")
_LOADS, _TURNS = 4, 30
_PEAK_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class LayoutTiming:
    """What one layout takes.

    Attributes:
        stored_bits, resident_bits: a weight in the file, and in memory; scales included.
        expert_bytes: of one expert in memory.
        peak_bytes: that memory grew by at most while one expert was read, the expert included;
            None where the system does not tell.
        load_rate: bytes of the file a second, while they become the expert.
        token: seconds of one token through both experts.
        of_nf4: `token` over that of NF4 in the same turns.
    """

    layout: str
    stored_bits: float
    resident_bits: float
    expert_bytes: int
    peak_bytes: int | None
    load_rate: float
    token: float
    of_nf4: float


@dataclass(frozen=True, kw_only=True)
class LayoutReport:
    """One run.

    Attributes:
        isa: the instruction set of the kernels.
        note: who else used the machine.
    """

    command: str
    date: str
    cpu: str
    threads: int
    isa: str | None
    torch: str
    shape: Mapping[str, int]
    note: str
    measurements: tuple[LayoutTiming, ...]

    def __str__(self) -> str:
        return f"{self.cpu}, {self.threads} threads, {self.isa}\n\n{table(self.measurements)}"


def table(timings: Sequence[LayoutTiming]) -> str:
    """The figures in markdown."""
    header = (
        *("two experts of a layer", "bits, file", "bits, memory", "read"),
        *("peak, MiB", "one expert, MiB", "1 token, ms", "of NF4's"),
    )
    return markdown.table(header, map(_cells, timings))


def _cells(timing: LayoutTiming) -> tuple[str, ...]:
    return (
        timing.layout,
        f"{timing.stored_bits:.3f}",
        f"{timing.resident_bits:.3f}",
        f"{timing.load_rate / 1e9:.2f} GB/s",
        "" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.0f}",
        f"{timing.expert_bytes / 2**20:.0f}",
        f"{1e3 * timing.token:.1f}",
        f"{timing.of_nf4:.2f}",
    )


def measure_layouts(
    config: MixtralConfig,
    *,
    note: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> LayoutReport:
    """Measure the layouts, with one of them and NF4 in memory at a time.

    Raises:
        ResourceError: the CPU kernels are not compiled.
    """
    if library().isa is None:
        raise ResourceError("the CPU kernels are not compiled", remedy="See the warning above.")
    with tempfile.TemporaryDirectory() as scratch:
        nf4 = _experts(_reader(Path(scratch), LAYOUTS[NF4], config))
    timings = []
    for name, stored in LAYOUTS.items():
        progress(name)
        with tempfile.TemporaryDirectory() as scratch:
            timings.append(_measure(name, _reader(Path(scratch), stored, config), nf4))
    return LayoutReport(
        command=command_line("layouts"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=machine.processor(),
        threads=torch.get_num_threads(),
        isa=library().isa,
        torch=torch.__version__,
        shape={"hidden": config.hidden_size, "width": config.intermediate_size},
        note=note,
        measurements=tuple(timings),
    )


def _reader(folder: Path, stored: Stored, config: MixtralConfig) -> ExpertReader:
    """Reads experts that are stored so, from a checkpoint written into an empty folder."""
    write_experts(folder, stored, config)
    checkpoint = open_checkpoint(folder)
    return ExpertReader(checkpoint, torch.bfloat16, lambda weight, _: weight)


def _experts(reader: ExpertReader) -> list[Expert]:
    return [reader.load(index) for index in range(len(reader))]


def _measure(name: str, reader: ExpertReader, nf4: Sequence[Expert]) -> LayoutTiming:
    elapsed = []
    for _ in range(_LOADS):
        begun = time.perf_counter()
        expert = reader.load(0)
        elapsed.append(time.perf_counter() - begun)
        nbytes, count = expert_sizes(expert)
        del expert
    peak = _peak(partial(reader.load, 0))
    token, other = _token_times(_experts(reader), nf4)
    return LayoutTiming(
        layout=name,
        stored_bits=8 * reader.file_bytes(0) / count,
        resident_bits=8 * nbytes / count,
        expert_bytes=nbytes,
        peak_bytes=peak,
        load_rate=reader.file_bytes(0) / min(elapsed),
        token=token,
        of_nf4=token / other,
    )


def expert_sizes(expert: Expert) -> tuple[int, int]:
    """Bytes of an expert in memory, and how many weights it has."""
    weights = vars(expert).values()
    count = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    return sum(weight.nbytes for weight in weights), count


def _peak(work: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory grows at most during a call, its result included."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not resident
        _PEAK_RESET.write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return None
    before = resident_bytes()
    result = work()
    peak = peak_resident_bytes()
    del result
    return None if before is None or peak is None else peak - before


def _token_times(experts: Sequence[Expert], nf4: Sequence[Expert]) -> tuple[float, float]:
    """The least seconds of one token through the experts, and through NF4's in turns with them."""
    hidden = experts[0].w1.shape[1]
    routes = Routes(torch.arange(len(experts))[None], torch.full((1, len(experts)), 0.5))
    best = [float("inf"), float("inf")]
    for _ in range(_TURNS):
        x = torch.randn(1, hidden).bfloat16()
        for index, chosen in enumerate((experts, nf4)):
            work = partial(kernels.experts, x, routes, chosen, F.silu)
            best[index] = min(best[index], seconds(work, _CPU))
    return best[0], best[1]


def _print(note: str, record: Path | None) -> None:
    report = measure_layouts(stored_experts.shape(), note=note, progress=say)
    publish(report, record)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.layouts", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    parser.add_argument("--note", default="", help="who else used the machine, for the record")
    options = parser.parse_args(arguments)
    return exit_code("layouts", lambda: _print(options.note, options.json))


if __name__ == "__main__":
    sys.exit(main())
