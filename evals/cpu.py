"""One Mixtral layer of true width on this CPU, beside the memory's bandwidth and other kernels.

`python -m qmix.evals.cpu [--json FILE] [--llama PYTHON] [--path SET] [--format NAME] [--part PART]`
times random 4-bit weights in the 8x7B's shapes, at one token, at 32 and at a prompt of 512. The
experts alone are compared with torch (dequantize, then multiply; its int4 kernel) and bitsandbytes.
A whole layer is compared with llama.cpp, which runs in an interpreter of its own (`--llama`, with
llama-cpp-python and gguf). All take turns within one run, so that other load on the machine affects
them alike; two programs are compared by the median of the turns' quotients. Every figure at one
token stands beside its bound: the bytes of the weights over the bandwidth of a plain read. `--path`
holds us to an instruction set; a llama.cpp that is built for no more (the record has its features)
is then an equal.
"""

import argparse
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from qmix import instruction_sets
from qmix.config import MixtralConfig
from qmix.evals import markdown
from qmix.evals.command import command_line, exit_code, publish, say
from qmix.evals.timing.cpu_layer import CpuTiming, PlainRead, time_experts, time_layer
from qmix.evals.timing.llama import LlamaPeer, start_llama
from qmix.evals.timing.random_layer import FORMATS, random_layer
from qmix.kernels.cpu.library import library
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.decoder_layer import DecoderLayer
from qmix.planning import machine

# The formats of whole layers, and what they stand beside: llama.cpp's usual kinds, or the same one.
LAYER_FORMATS = {
    "nf4 nested": ("Q4_0", "Q4_K"),
    "int4 g128": ("Q4_0", "Q4_K"),
    "int4 g32": ("Q4_0",),
    "q4_k": ("Q4_K",),
    "iq4_xs": ("IQ4_XS",),
}
LLAMA_KINDS = ("Q4_0", "Q4_K", "IQ4_XS")
# What both programs read from the same file of llama.cpp's kinds.
SAME_FILE = "gguf"
SAME_KINDS = ("Q4_0", "Q4_K_M", "IQ4_XS")
TOKENS = (1, 32, 512)
PARTS = ("experts", "layer")

_HEADER = (
    "part",
    "tokens",
    "way",
    "bits/weight",
    "ms, best (median)",
    "of the bandwidth",
    "of llama.cpp's time",
)


@dataclass(frozen=True, kw_only=True)
class CpuReport:
    """One run.

    Attributes:
        isa: the instruction set of our kernels.
        features: those of the processor that an instruction set of ours needs.
        bandwidth: bytes a second: the median of the plain reads, one before every turn at one
            token.
        bandwidth_range: the slowest and the fastest of them.
    """

    command: str
    date: str
    cpu: str
    threads: int
    isa: str | None
    features: tuple[str, ...]
    dtype: str
    shape: Mapping[str, int]
    versions: Mapping[str, str]
    bandwidth: float
    bandwidth_range: tuple[float, float]
    measurements: tuple[CpuTiming, ...]

    def __str__(self) -> str:
        low, high = (rate / 1e9 for rate in self.bandwidth_range)
        table = markdown.table(_HEADER, map(_cells, self.measurements))
        return (
            f"{self.cpu}, {self.threads} threads, {self.isa}; memory read at "
            f"{self.bandwidth / 1e9:.1f} GB/s ({low:.1f} to {high:.1f})\n\n{table}"
        )


def measure_cpu(
    config: MixtralConfig,
    *,
    llama_python: str | None,
    formats: Sequence[str] = FORMATS,
    parts: Sequence[str] = PARTS,
    tokens: Sequence[int] = TOKENS,
    progress: Callable[[str], None] = lambda what: None,
) -> CpuReport:
    """Measure everything.

    Args:
        llama_python: an interpreter with llama-cpp-python and gguf; None leaves llama.cpp out.
        parts: "experts", "layer" or both.
        progress: called with what is measured next.

    Raises:
        ResourceError: the CPU kernels are not compiled.
        UsageError: no such interpreter.
    """
    reads = PlainRead()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    timings: list[CpuTiming] = []
    for weight_format in filter(FORMATS.__contains__, formats if "experts" in parts else ()):
        layer = random_layer(config, weight_format)
        for count in tokens:
            progress(f"experts, {weight_format}, {count} tokens")
            timings += time_experts(layer, weight_format, count, reads)
        del layer
    if not llama_python:
        timings.append(CpuTiming.absent("layer", "llama.cpp", "not installed: no --llama"))
    for kind in dict.fromkeys((*LLAMA_KINDS, *SAME_KINDS)) if llama_python else (None,):
        beside = tuple(filter(partial(_stands_beside, kind), formats if "layer" in parts else ()))
        if not beside:
            continue
        with start_llama(llama_python, kind, config) as peer:
            versions.update(peer.versions)
            timings += _beside_llama(config, beside, tokens, peer, reads, progress)
    return CpuReport(
        command=command_line("cpu"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=machine.processor(),
        threads=torch.get_num_threads(),
        isa=library().isa,
        features=tuple(sorted(instruction_sets.features() & instruction_sets.NEEDED)),
        dtype="bfloat16",
        shape={
            "hidden": config.hidden_size,
            "width": config.intermediate_size,
            "experts": config.num_local_experts,
        },
        versions=versions,
        bandwidth=statistics.median(reads.rates),
        bandwidth_range=(min(reads.rates), max(reads.rates)),
        measurements=tuple(timings),
    )


def _beside_llama(
    config: MixtralConfig,
    formats: Sequence[str],
    tokens: Sequence[int],
    peer: LlamaPeer,
    reads: PlainRead,
    progress: Callable[[str], None],
) -> Iterator[CpuTiming]:
    """Layers of some formats, turn by turn with one of llama.cpp's kinds."""
    for weight_format in formats:
        layers = _layers(config, weight_format, peer)
        for count in tokens:
            progress(f"layer, {weight_format}, {peer.kind}, {count} tokens")
            yield from time_layer(layers, config, weight_format, count, peer, reads)
        del layers
    if peer.failure:
        yield CpuTiming.absent("layer", f"llama.cpp {peer.kind}", peer.failure)


def _layers(config: MixtralConfig, weight_format: str, peer: LlamaPeer) -> list[DecoderLayer]:
    """Three layers of a format, or those of the file that llama.cpp has loaded."""
    if weight_format != SAME_FILE:
        return [random_layer(config, weight_format) for _ in range(3)]
    file = peer.folder / f"{peer.kind}-3.gguf"
    model = MixtralForCausalLM.from_pretrained(file, dtype=torch.bfloat16, device="cpu")
    return [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]


def _stands_beside(kind: str | None, weight_format: str) -> bool:
    """Whether a layer of a format is timed with llama.cpp's kind; None is without llama.cpp."""
    if weight_format == SAME_FILE:
        return kind in SAME_KINDS
    kinds = LAYER_FORMATS.get(weight_format, ())
    return kind in kinds if kind else bool(kinds)


def _cells(timing: CpuTiming) -> tuple[str, ...]:
    elapsed = timing.note
    if timing.best is not None and timing.median is not None:
        elapsed = f"{1e3 * timing.best:.1f} ({1e3 * timing.median:.1f})"
    return (
        timing.part,
        str(timing.tokens),
        timing.way,
        "" if timing.bits is None else f"{timing.bits:.3f}",
        elapsed,
        "" if timing.of_bound is None else f"{100 * timing.of_bound:.0f} %",
        "" if timing.of_peer is None else "{:.2f} ({:.2f} to {:.2f})".format(*timing.of_peer),
    )


def _print(options: argparse.Namespace) -> None:
    report = measure_cpu(
        MixtralConfig(),
        llama_python=options.llama,
        formats=options.format or FORMATS,
        parts=options.part or PARTS,
        progress=say,
    )
    publish(report, options.json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.cpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    parser.add_argument(
        "--llama", metavar="PYTHON", help="an interpreter that has llama-cpp-python and gguf"
    )
    parser.add_argument(
        "--path",
        metavar="SET",
        choices=tuple(instruction_sets.ISAS),
        help="the instruction set to hold us to",
    )
    parser.add_argument(
        "--format",
        action="append",
        choices=(*FORMATS, SAME_FILE),
        help="measure this one, or llama.cpp's own files in both programs; may be repeated",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this one only")
    options = parser.parse_args(arguments)
    if options.path:
        os.environ[instruction_sets.VARIABLE] = options.path
    return exit_code("cpu", lambda: _print(options))


if __name__ == "__main__":
    sys.exit(main())
