"""Times of one decoder layer on this CPU, turn by turn with other kernels and a plain memory read.

All take turns within one run, so that other load on the machine affects them alike. Shape letters:
T tokens. Knows nothing of printing or of records.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.errors import ResourceError
from qmix.evals.timing import cpu_peers
from qmix.evals.timing.bandwidth import seconds
from qmix.evals.timing.cpu_peers import ExpertsForward
from qmix.evals.timing.llama import LlamaPeer
from qmix.kernels import Routes
from qmix.kernels.cpu.library import library
from qmix.nn.attention import ForwardContext
from qmix.nn.cpu_decode import WhyNot, decode_tokens
from qmix.nn.decoder_layer import DecoderLayer, compiled_whole
from qmix.nn.linear import Linear
from qmix.weights import huge_pages
from qmix.weights.dense import Weight
from qmix.weights.expert import Expert

_CPU = torch.device("cpu")
_EXPERTS_PER_TOKEN = 2
_READ_BYTES = 1 << 29
# Of the kinds, Q4_K_M's in a layer with more bits: 2/3 of 4.5 and 1/3 of 6.5625.
LLAMA_BITS = {"Q4_0": 4.5, "Q4_K": 4.5, "Q4_K_M": 5.19, "IQ4_XS": 4.25}
# Seconds until the threads of the previous program have stopped spinning for more work.
_PAUSE = 0.02
# Turns by number of tokens, after one that does not count; for experts and for whole layers.
_EXPERT_TURNS = {1: 40, 32: 7, 512: 2}
_LAYER_TURNS = {1: 120, 32: 7, 512: 3}
# The turns in which a slow peer takes part, at one token and at more; each takes it seconds.
_SLOW_TURNS = ((0, 1, 2, 3), (1,))


@dataclass(frozen=True, kw_only=True)
class CpuTiming:
    """The time that one implementation took.

    Attributes:
        part: "experts" (of one layer) or "layer" (with attention, router and norms).
        tokens: T.
        way: the implementation and its format.
        bits: bits a weight, scales included.
        best, median: seconds; None if it did not run, and `note` says why.
        of_bound: at one token, the bytes of its weights a second over a plain read in the same
            turn; the median over all turns.
        of_peer: our time over llama.cpp's in the same turn: the median over all turns, and the
            order statistics that enclose it in 19 of 20 samples of such turns (a run at another
            hour may differ by more). With fewer than ten turns, the least and the most.
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

    @classmethod
    def absent(cls, part: str, way: str, note: str, tokens: int = 1) -> "CpuTiming":
        """An implementation that did not run."""
        return cls(part=part, tokens=tokens, way=way, note=note)


class PlainRead:
    """Reads 512 MiB once on torch's threads: the bandwidth that a turn's matmuls are compared with.

    The bandwidth of a shared machine varies by half, so only a read in the same turn compares.

    Attributes:
        rates: bytes a second of every read so far.

    Raises:
        ResourceError: the CPU kernels are not compiled.
    """

    def __init__(self) -> None:
        if library().isa is None:
            raise ResourceError("the CPU kernels are not compiled", remedy="See the warning above.")
        self._memory = torch.empty(_READ_BYTES, dtype=torch.uint8)
        huge_pages.ask(self._memory)  # as weights are
        self._memory.fill_(1)
        self.rates: list[float] = []
        self.rate()

    def rate(self) -> float:
        """Bytes a second, measured now."""
        elapsed = seconds(partial(library().read, self._memory), _CPU)
        self.rates.append(self._memory.nbytes / elapsed)
        return self.rates[-1]


def time_experts(
    layer: DecoderLayer, weight_format: str, tokens: int, reads: PlainRead
) -> list[CpuTiming]:
    """Time our kernels and the peers with the same routes. Inputs and routes are new every turn."""
    experts = layer.block_sparse_moe.stored
    hidden = experts[0].w1.shape[1]
    generator = torch.Generator().manual_seed(tokens)
    ways, absent = _ways(experts, weight_format, tokens)
    nbytes = _EXPERTS_PER_TOKEN * sum(weight.nbytes for weight in vars(experts[0]).values())
    times: dict[str, list[float]] = {name: [] for name in ways}
    fractions: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_EXPERT_TURNS.get(tokens, 5) + 1):
        x = torch.randn(tokens, hidden, generator=generator).bfloat16()
        routes = _random_routes(tokens, len(experts), generator)
        read = reads.rate() if tokens == 1 else None
        for name, way in ways.items():
            if not name.startswith("qmix") and turn not in _SLOW_TURNS[tokens > 1]:
                continue
            elapsed = seconds(partial(way, x, routes), _CPU)
            if turn:
                times[name].append(elapsed)
                fractions[name] += [nbytes / elapsed / read] if read else []
    return [
        CpuTiming(
            part="experts",
            tokens=tokens,
            way=name,
            bits=_bits(experts[0]),
            best=min(elapsed),
            median=statistics.median(elapsed),
            of_bound=statistics.median(fractions[name]) if fractions[name] else None,
        )
        for name, elapsed in times.items()
    ] + absent


def _ways(
    experts: Sequence[Expert], weight_format: str, tokens: int
) -> tuple[dict[str, ExpertsForward], list[CpuTiming]]:
    """Our kernels and the peers that take these weights, and the peers that are not installed."""
    ways: dict[str, ExpertsForward] = {
        f"qmix {weight_format}": lambda x, routes: kernels.experts(x, routes, experts, F.silu),
        f"torch dequantize, {weight_format}": cpu_peers.dequantizing(experts),
    }
    absent = []
    for name, peer in (
        ("torch int4pack", cpu_peers.int4pack),
        ("bitsandbytes", cpu_peers.bitsandbytes),
    ):
        way = f"{name}, {weight_format}"
        try:
            forward = peer(experts)
        except ImportError as error:
            absent.append(CpuTiming.absent("experts", way, f"not installed: {error}", tokens))
            continue
        if forward is not None:
            ways[way] = forward
    return ways, absent


def _random_routes(tokens: int, experts: int, generator: torch.Generator) -> Routes:
    ids = torch.stack(
        [torch.randperm(experts, generator=generator)[:_EXPERTS_PER_TOKEN] for _ in range(tokens)]
    )
    return Routes(ids, torch.full(ids.shape, 1 / _EXPERTS_PER_TOKEN))


def time_layer(
    layers: Sequence[DecoderLayer],
    config: MixtralConfig,
    weight_format: str,
    tokens: int,
    peer: LlamaPeer,
    reads: PlainRead,
) -> list[CpuTiming]:
    """Time a whole layer, turn by turn with llama.cpp's.

    The time of a layer is half the difference between three layers and one, for both programs.

    Args:
        layers: three layers of one format.
    """
    context = ForwardContext.without_past(config, tokens, _CPU, torch.bfloat16)
    nbytes = bytes_of_token(layers[0])
    fractions: list[float] = []
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []

    with torch.no_grad():
        for turn in range(_LAYER_TURNS.get(tokens, 5) + 1):
            x = torch.randn(1, tokens, config.hidden_size).bfloat16()
            time.sleep(_PAUSE)
            read = reads.rate() if tokens == 1 and not turn % 3 else None
            one = seconds(partial(forward_layers, layers[:1], x, context), _CPU)
            three = seconds(partial(forward_layers, layers, x, context), _CPU)
            time.sleep(_PAUSE)
            peer_times = peer.seconds(tokens)
            if turn:
                ours.append((one, three))
                fractions += [nbytes / _per_layer(one, three) / read] if read else []
                theirs += [peer_times] if peer_times else []
    beside = f" (beside {peer.kind})" if peer.kind else ""
    bits = _bits(layers[0].block_sparse_moe.stored[0])
    timing = _layer_timing(f"qmix {weight_format}{beside}", tokens, bits, ours)
    timing = replace(timing, of_bound=statistics.median(fractions) if fractions else None)
    if not theirs:
        return [timing]
    quotients = [_per_layer(*a) / _per_layer(*b) for a, b in zip(ours, theirs, strict=True)]
    return [
        replace(timing, of_peer=median_between(quotients)),
        _layer_timing(
            f"llama.cpp {peer.kind} (beside {weight_format})",
            tokens,
            LLAMA_BITS[str(peer.kind)],
            theirs,
        ),
    ]


def forward_layers(layers: Sequence[DecoderLayer], x: Tensor, context: ForwardContext) -> None:
    """x [1, T, D] through layers as a model takes it: a token in one call, if that may be."""
    if isinstance(decode_tokens(map(compiled_whole, layers), x, context), WhyNot):
        for layer in layers:
            x, _ = layer(x, context)


def bytes_of_token(layer: DecoderLayer) -> int:
    """The bytes of weights that one token reads in a layer."""
    attention: int = sum(
        module.stored.nbytes for module in layer.self_attn.modules() if isinstance(module, Linear)
    )
    expert: int = sum(weight.nbytes for weight in vars(layer.block_sparse_moe.stored[0]).values())
    return attention + _EXPERTS_PER_TOKEN * expert


def _bits(expert: Expert) -> float:
    """Bits a weight: GGUF's kinds mix several in an expert."""
    weights: list[Weight] = list(vars(expert).values())
    return 8 * sum(each.nbytes for each in weights) / sum(math.prod(each.shape) for each in weights)


def median_between(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and the order statistics that enclose it in 19 of 20 samples (binomial)."""
    ordered = sorted(values)
    reach = round(0.98 * len(ordered) ** 0.5)
    low = max(0, len(ordered) // 2 - reach) if len(ordered) >= 10 else 0
    return statistics.median(ordered), ordered[low], ordered[-1 - low]


def _per_layer(one: float, three: float) -> float:
    return (three - one) / 2


def _layer_timing(
    way: str, tokens: int, bits: float, times: Sequence[tuple[float, float]]
) -> CpuTiming:
    """The time of a layer from the seconds of one layer and of three."""
    return CpuTiming(
        part="layer",
        tokens=tokens,
        way=way,
        bits=bits,
        best=_per_layer(min(one for one, _ in times), min(three for _, three in times)),
        median=statistics.median(_per_layer(*pair) for pair in times),
        note="half of three layers less one",
    )
