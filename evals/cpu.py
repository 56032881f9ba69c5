"""One Mixtral layer of true width on this machine's CPU, beside the memory's bandwidth and the others.

`python -m qmix.evals.cpu [--json FILE] [--llama PYTHON]`: random 4-bit weights of the 8x7B's shapes, at
one token, at 32 and at a prompt of 512. The experts alone against torch (dequantize, then multiply;
its int4 kernel) and bitsandbytes, a whole layer against llama.cpp in an interpreter of its own
(`--llama`, with llama-cpp-python and gguf). All take turns within one run, so that what else the machine
does meets them alike: the median of the turns' quotients is what compares two programs. Every figure at
one token stands beside its bound: the bytes of the weights over the bandwidth of a plain read.

Shape letters: T tokens, E experts, N outputs, K inputs, D hidden width, F expert width.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.errors import QmixError, ResourceError
from qmix.evals.timing.bandwidth import seconds
from qmix.evals.timing.llama import Llama, llama
from qmix.kernels import Routes, tiles
from qmix.kernels.cpu.library import library
from qmix.kernels.moe import moe_forward
from qmix.nn.attention import ForwardContext
from qmix.nn.cpu_decode import WhyNot, decode_token
from qmix.nn.decoder_layer import DecoderLayer, compiled_whole
from qmix.nn.linear import Linear
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert
from qmix.weights.integers import Int4
from qmix.weights.nf4 import NF4, NF4_VALUES, NestedAbsmax

CPU = torch.device("cpu")
FORMATS = ("nf4", "nf4 nested", "int4 g128", "int4 g32")
LAYER_FORMATS = ("nf4", "int4 g32")  # of as many bits as these:
LLAMA_KINDS = ("Q4_0", "Q4_K")
TOKENS = (1, 32, 512)
CHOICES = 2
_READ_BYTES = 1 << 29
# Seconds until the threads of the one before us no longer wait in a loop for more work.
_PAUSE = 0.02
# Turns at so many tokens, after one that does not count; and of whole layers.
_TURNS = {1: 40, 32: 7, 512: 2}
_LAYER_TURNS = {1: 120, 32: 7, 512: 3}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one way took.

    Attributes:
        part: "experts" (one layer's) or "layer" (attention, router and norms too).
        tokens: T. way: whose. bits: a weight, scales included.
        best, median: seconds; None if it did not run, and `note` says why.
        of_bound: at one token, the bandwidth of its weights' bytes over that of a plain read in the same
            turn, the median of all turns.
        of_peer: our time over llama.cpp's in the same turn, the median of all turns, and the order statistics
            that hold it in 19 of 20 samples of such turns (a run at another hour may differ by more); of
            less than ten turns the least and the most.
    """

    part: str
    tokens: int
    way: str
    bits: float | None = None
    best: float | None = None
    median: float | None = None
    of_bound: float | None = None
    of_peer: tuple[float, float, float] | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run; `bandwidth` in bytes a second: the median of a plain read before every turn at one token."""

    command: str
    date: str
    cpu: str
    threads: int
    isa: str | None
    dtype: str
    shape: Mapping[str, int]
    versions: Mapping[str, str]
    bandwidth: float
    bandwidth_range: tuple[float, float]
    measurements: tuple[Measurement, ...]

    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The table, header first."""
        header = (
            "part", "tokens", "way", "bits/weight", "ms, best (median)", "of the bandwidth", "of llama.cpp's time",
        )  # fmt: skip
        return (header, *(_row(one) for one in self.measurements))


def random_weight(form: str, shape: tuple[int, int], seed: int) -> Weight:
    """A weight [N, K] of random codes, its values about as large as K ** -0.5."""
    rows, inputs = shape
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    if form.startswith("int4"):
        group = min(int(form.removeprefix("int4 g")), inputs)
        scales = torch.rand(rows, inputs // group, generator=generator).add_(0.5)
        return Int4(drawn(rows, inputs // 2), scales.mul_(inputs**-0.5 / 5).half())
    blocks = rows * inputs // 64
    absmax: Tensor | NestedAbsmax
    if form == "nf4 nested":
        outer = torch.full((-(-blocks // 256),), inputs**-0.5)
        absmax = NestedAbsmax(drawn(blocks), outer, torch.linspace(-1, 1, 256), 2 * inputs**-0.5)
    else:
        absmax = torch.rand(blocks, generator=generator).add_(1).mul_(inputs**-0.5)
    codes = drawn(rows * inputs // 2)
    return NF4(codes, absmax, torch.tensor(NF4_VALUES), shape, torch.bfloat16)


def random_layer(config: MixtralConfig, form: str) -> DecoderLayer:
    """A layer whose attention and experts are random weights of one format."""
    with torch.device("meta"):
        layer = DecoderLayer(config, 0)
    for seed, (name, module) in enumerate(layer.named_modules()):
        if isinstance(module, Linear) and name.endswith("gate"):
            gate = torch.randn(module.out_features, module.in_features).bfloat16()
            module.weight = nn.Parameter(gate / module.in_features**0.5)
        elif isinstance(module, Linear):
            module.store(random_weight(form, (module.out_features, module.in_features), seed))
        elif name.endswith("norm"):
            module.weight = nn.Parameter(torch.ones(config.hidden_size, dtype=torch.bfloat16))
    return layer.eval()


class PlainRead:
    """Reads 512 MiB once, on torch's threads: what a turn's matmuls are measured against.

    The bandwidth of a machine that others use too wanders by a half: only what was read in the same turn
    compares. `rates` are bytes a second.

    Raises:
        ResourceError: no compiled kernels.
    """

    def __init__(self) -> None:
        if library().isa is None:
            raise ResourceError("the CPU kernels are not compiled", remedy="See the warning above.")
        self._memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
        self.rates: list[float] = []
        self.rate()

    def rate(self) -> float:
        """Of now."""
        taken = seconds(partial(library().read, self._memory), CPU)
        self.rates.append(self._memory.nbytes / taken)
        return self.rates[-1]


def run(
    config: MixtralConfig,
    *,
    llama_python: str | None,
    formats: Sequence[str] = FORMATS,
    tokens: Sequence[int] = TOKENS,
    progress: Callable[[str], None] = lambda what: None,
) -> Report:
    """Measure everything.

    Raises:
        ResourceError: no compiled kernels.
    """
    reads = PlainRead()
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    measured: list[Measurement] = []
    for form in formats:
        layer = random_layer(config, form)
        for count in tokens:
            progress(f"experts, {form}, {count} tokens")
            measured += _of_experts(layer, form, count, reads)
        if form != formats[-1]:
            del layer
    kinds = LLAMA_KINDS if llama_python else ()
    if not llama_python:
        measured.append(_absent("layer", "llama.cpp", "not installed: no --llama"))
    for kind in kinds or (None,):
        with llama(llama_python, kind, config) as peer:
            versions.update(peer.versions)
            if peer.failure:
                measured.append(_absent("layer", f"llama.cpp {kind}", peer.failure))
            for form in (form for form in formats if form in LAYER_FORMATS):
                layers = [random_layer(config, form) for _ in range(3)]
                for count in tokens:
                    progress(f"layer, {form}, {kind}, {count} tokens")
                    measured += _of_layer(layers, config, form, count, peer, reads)
                del layers
    return Report(
        command=" ".join(("python -m qmix.evals.cpu", *sys.argv[1:])),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=processor(),
        threads=torch.get_num_threads(),
        isa=library().isa,
        dtype="bfloat16",
        shape={
            "hidden": config.hidden_size,
            "width": config.intermediate_size,
            "experts": config.num_local_experts,
        },
        versions=versions,
        bandwidth=statistics.median(reads.rates),
        bandwidth_range=(min(reads.rates), max(reads.rates)),
        measurements=tuple(measured),
    )


def processor() -> str:
    """The CPU's model, from the kernel where it says it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _of_experts(layer: DecoderLayer, form: str, count: int, reads: PlainRead) -> list[Measurement]:
    """Ours and the others' with the same routes; inputs and routes are new every turn."""
    weights = layer.block_sparse_moe.stored
    hidden = weights[0].w1.shape[1]
    sample = weights[0].w1
    bits = 8 * sample.nbytes / (sample.shape[0] * sample.shape[1])
    generator = torch.Generator().manual_seed(count)

    def turn() -> tuple[Tensor, Routes]:
        x = torch.randn(count, hidden, generator=generator).bfloat16()
        ids = torch.stack(
            [torch.randperm(len(weights), generator=generator)[:CHOICES] for _ in range(count)]
        )
        return x, Routes(ids, torch.full(ids.shape, 1 / CHOICES))

    ways: dict[str, Callable[[Tensor, Routes], object]] = {
        f"qmix {form}": partial(_experts, weights=weights),
        f"torch dequantize, {form}": partial(_on_torch, weights=weights),
    }
    found: list[Measurement] = []
    for name, peer in (("torch int4pack", _int4pack), ("bitsandbytes", _bitsandbytes)):
        try:
            matmuls = peer(weights)
        except ImportError as error:
            found.append(_absent("experts", f"{name}, {form}", f"not installed: {error}", count))
            continue
        if matmuls is not None:
            ways[f"{name}, {form}"] = partial(_peer_experts, matmuls=matmuls)
    nbytes = CHOICES * sum(weight.nbytes for weight in vars(weights[0]).values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    parts: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(_TURNS.get(count, 5) + 1):
        x, routes = turn()
        read = reads.rate() if count == 1 else None
        for name, way in ways.items():
            slow = not name.startswith("qmix")
            if slow and index not in ((0, 1, 2, 3) if count == 1 else (1,)):
                continue  # seconds each
            taken = seconds(partial(way, x, routes), CPU)
            if index:
                times[name].append(taken)
                parts[name] += [nbytes / taken / read] if read else []
    return [
        Measurement(
            part="experts",
            tokens=count,
            way=name,
            bits=bits,
            best=min(taken),
            median=statistics.median(taken),
            of_bound=statistics.median(parts[name]) if parts[name] else None,
        )
        for name, taken in times.items()
    ] + found


def _of_layer(
    layers: Sequence[DecoderLayer],
    config: MixtralConfig,
    form: str,
    count: int,
    peer: Llama,
    reads: PlainRead,
) -> list[Measurement]:
    """A whole layer, turn by turn with llama.cpp's: half of what three take longer than one, of either."""
    positions = torch.arange(count)[None]
    cos, sin = kernels.rotary(positions, config.head_dim, config.rope_theta, torch.bfloat16)
    context = ForwardContext(cos=cos, sin=sin)
    nbytes = sum(
        module.stored.nbytes
        for module in layers[0].self_attn.modules()
        if isinstance(module, Linear)
    ) + CHOICES * sum(
        weight.nbytes for weight in vars(layers[0].block_sparse_moe.stored[0]).values()
    )
    parts: list[float] = []
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []

    def through(x: Tensor, some: Sequence[DecoderLayer]) -> None:
        if isinstance(decode_token(map(compiled_whole, some), x, context), WhyNot):
            for each in some:
                x, _ = each(x, context)

    with torch.no_grad():
        for index in range(_LAYER_TURNS.get(count, 5) + 1):
            x = torch.randn(1, count, config.hidden_size).bfloat16()
            time.sleep(_PAUSE)
            read = reads.rate() if count == 1 and not index % 3 else None
            one = seconds(partial(through, x, layers[:1]), CPU)
            three = seconds(partial(through, x, layers), CPU)
            time.sleep(_PAUSE)
            other = peer.seconds(count)
            if index:
                ours.append((one, three))
                parts += [nbytes / _a_layer(one, three) / read] if read else []
                theirs += [other] if other else []
    sample = layers[0].self_attn.q_proj.stored
    bits = 8 * sample.nbytes / (sample.shape[0] * sample.shape[1])
    beside = f" (beside {peer.kind})" if peer.kind else ""
    row = _layer_row(f"qmix {form}{beside}", count, bits, ours)
    row = replace(row, of_bound=statistics.median(parts) if parts else None)
    if not theirs:
        return [row]
    quotients = [_a_layer(*a) / _a_layer(*b) for a, b in zip(ours, theirs, strict=True)]
    return [
        replace(row, of_peer=median_between(quotients)),
        _layer_row(f"llama.cpp {peer.kind} (beside {form})", count, 4.5, theirs),
    ]


def median_between(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the order statistics between which it lies in 19 of 20 samples (binomial)."""
    ordered = sorted(values)
    reach = round(0.98 * len(ordered) ** 0.5)
    low = max(0, len(ordered) // 2 - reach) if len(ordered) >= 10 else 0
    return statistics.median(ordered), ordered[low], ordered[-1 - low]


def _a_layer(one: float, three: float) -> float:
    return (three - one) / 2


def _layer_row(
    way: str, count: int, bits: float, times: Sequence[tuple[float, float]]
) -> Measurement:
    """Of the seconds of one layer and of three."""
    return Measurement(
        part="layer",
        tokens=count,
        way=way,
        bits=bits,
        best=_a_layer(min(one for one, _ in times), min(three for _, three in times)),
        median=statistics.median(_a_layer(*both) for both in times),
        note="half of three layers less one",
    )


def _experts(x: Tensor, routes: Routes, weights: Sequence[Expert]) -> Tensor:
    return kernels.experts(x, routes, weights, F.silu)


def _on_torch(x: Tensor, routes: Routes, weights: Sequence[Expert]) -> Tensor:
    """A tile decoded, then multiplied by torch: what runs without a compiler."""

    def linears(x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
        return [
            tiles.integers(x, one) if isinstance(one, Int4) else tiles.nf4(x, one)
            for one in weights
        ]

    return moe_forward(x, routes, weights, F.silu, linears)


_Matmul = Callable[[Tensor], Tensor]


def _peer_experts(
    x: Tensor, routes: Routes, matmuls: Sequence[tuple[_Matmul, _Matmul, _Matmul]]
) -> None:
    for index in torch.unique(routes.ids).tolist():
        w1, w2, w3 = matmuls[index]
        token = torch.where(routes.ids == index)[0]
        chosen = x[token]
        w2(F.silu(w1(chosen)) * w3(chosen))


def _int4pack(
    weights: Sequence[Expert],
) -> list[tuple[_Matmul, _Matmul, _Matmul]] | None:
    """torch's `_weight_int4pack_mm_for_cpu`; one expert stands for all but for its memory."""
    if not isinstance(weights[0].w1, Int4):
        return None

    def matmul(weight: Weight) -> _Matmul:
        assert isinstance(weight, Int4)
        codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).view(weight.shape)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        scales = weight.scales.t().bfloat16()
        both = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return lambda x: multiply(x, packed, weight.group_inputs, both)

    return [(matmul(one.w1), matmul(one.w2), matmul(one.w3)) for one in weights]


def _bitsandbytes(
    weights: Sequence[Expert],
) -> list[tuple[_Matmul, _Matmul, _Matmul]] | None:
    """bitsandbytes' matmul_4bit on the same NF4 bytes, plain absmax."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    package: Any = importlib.import_module("bitsandbytes")

    def matmul(weight: Weight) -> _Matmul:
        assert isinstance(weight, NF4)
        assert isinstance(weight.absmax, Tensor)
        state = functional.QuantState(
            absmax=weight.absmax,
            shape=torch.Size(weight.shape),
            dtype=torch.bfloat16,
            blocksize=weight.block_size,
            code=weight.table,
            quant_type="nf4",
        )
        codes = weight.codes.view(-1, 1)
        return lambda x: package.matmul_4bit(x, codes.t(), state)

    first = weights[0].w1
    if not isinstance(first, NF4) or not isinstance(first.absmax, Tensor):
        return None
    return [(matmul(one.w1), matmul(one.w2), matmul(one.w3)) for one in weights]


def _absent(part: str, way: str, note: str, count: int = 1) -> Measurement:
    return Measurement(part=part, tokens=count, way=way, note=note)


def _row(one: Measurement) -> tuple[str, ...]:
    took = one.note
    if one.best is not None and one.median is not None:
        took = f"{1e3 * one.best:.1f} ({1e3 * one.median:.1f})"
    return (
        one.part,
        str(one.tokens),
        one.way,
        "" if one.bits is None else f"{one.bits:.3f}",
        took,
        "" if one.of_bound is None else f"{100 * one.of_bound:.0f} %",
        "" if one.of_peer is None else "{:.2f} ({:.2f} to {:.2f})".format(*one.of_peer),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.cpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the record here too")
    parser.add_argument("--llama", help="an interpreter that has llama-cpp-python and gguf")
    options = parser.parse_args(arguments)
    try:
        report = run(
            MixtralConfig(),
            llama_python=options.llama,
            progress=lambda what: print(what, file=sys.stderr, flush=True),  # noqa: T201
        )
        if options.json:
            record = json.dumps(asdict(report), indent=1) + "\n"
            options.json.write_text(record, encoding="utf-8")
        sys.stdout.write(f"{report.cpu}, {report.threads} threads, {report.isa}; ")
        low, high = (rate / 1e9 for rate in report.bandwidth_range)
        sys.stdout.write(
            f"memory read at {report.bandwidth / 1e9:.1f} GB/s ({low:.1f} to {high:.1f})\n\n"
        )
        for index, row in enumerate(report.rows()):
            sys.stdout.write("| " + " | ".join(row) + " |\n")
            if not index:
                sys.stdout.write("|" + " --- |" * len(row) + "\n")
    except QmixError as error:
        sys.stderr.write(f"cpu: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
