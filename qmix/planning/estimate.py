"""What a plan means: how fast, what quantizing costs, and what would help, each with its figure.

Pure arithmetic over plans and rates. Knows no torch and does not look at the machine.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from qmix.errors import ResourceError
from qmix.planning import budget, gpus, quantize_cost, roofline
from qmix.planning.footprint import StoredModel
from qmix.planning.plan import Plan, plan
from qmix.planning.roofline import Path, Rates
from qmix.weights.scheme import Scheme

# 9.23 GB of bfloat16 to NF4 in 36 s on two processors, checksums and fsync included (evals/LOG.md).
REWRITE_BANDWIDTH = 0.256e9
# GPTQ of full-width layers on two processors: 29 % of a layer of 146 TFLOP in 30 minutes of one
# processor's time (evals/LOG.md): the order of magnitude, not more.
CPU_FLOPS = 23e9
_CALIBRATION = 256 * 2048  # tokens: the default of qmix quantize
_TOKEN_ARRAYS = 5  # float32 [T, D] with correction; beyond 4 GiB they are kept in files
_ARRAYS_IN_MEMORY = 4 << 30


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Decode tokens a second of all rows together, one way of serving misses.

    Attributes:
        path: of experts that the fastest memory does not hold.
        bound: with an empty cache; `bound_full` with the planned context in it.
        expected: `share` of the bound, until it has been measured.
    """

    path: Path
    bound: float
    bound_full: float
    expected: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What `qmix quantize` would take of a 16-bit checkpoint.

    Attributes:
        bytes_in, bytes_out: of the weights' files. scratch: on the disk while it runs. peak: of host
            memory.
        seconds: on two processors. gpu_seconds: on a large GPU; None if the method uses none.
        source: of the times.
    """

    method: str
    scheme: str
    bytes_in: int
    bytes_out: int
    scratch: int
    peak: int
    seconds: float
    gpu_seconds: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Something to change, and what it yields."""

    change: str
    yields: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A plan with all that follows from it."""

    plan: Plan
    rates: Rates
    speeds: tuple[Speed, ...]
    quantization: tuple[Quantization, ...]
    suggestions: tuple[Suggestion, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document; bytes and bytes a second."""
        model = self.plan.model
        used = {name for speed in self.speeds for name in _USED[speed.path]}
        return {
            "model": model.name,
            "assumed": None if model.assumed is None else str(model.assumed),
            "weights_bytes": model.stored,
            **self.plan.to_dict(),
            "rates": {name: asdict(getattr(self.rates, name)) for name in sorted(used)},
            "speeds": [asdict(speed) for speed in self.speeds],
            "quantization": [asdict(one) for one in self.quantization],
            "suggestions": [asdict(one) for one in self.suggestions],
        }


_USED: dict[Path, tuple[str, ...]] = {
    "resident": ("device",),
    "interconnect": ("device", "interconnect"),
    "cpu": ("device", "host"),
    "host": ("host",),
    "host and disk": ("host", "disk"),
}


def rates_used(speeds: tuple[Speed, ...]) -> tuple[str, ...]:
    """The rates that any of these speeds depends on."""
    return tuple(dict.fromkeys(name for speed in speeds for name in _USED[speed.path]))


def estimate(planned: Plan, rates: Rates, source: StoredModel | None = None) -> Estimate:
    """All that follows from a plan.

    Args:
        source: the 16-bit checkpoint that is still to be quantized for it, if it is.
    """
    return Estimate(
        plan=planned,
        rates=rates,
        speeds=tuple(_speeds(planned, rates)),
        quantization=tuple(_quantization(planned.model, source)) if source else (),
        suggestions=tuple(_suggestions(planned, rates)),
    )


def _paths(planned: Plan) -> tuple[Path, ...]:
    if not planned.gpu:
        return ("host",) if planned.resident else ("host and disk",)
    return ("resident",) if planned.resident else ("interconnect", "cpu")


def _speeds(planned: Plan, rates: Rates) -> Iterator[Speed]:
    cache = planned.model.kv_bytes(planned.context, planned.batch)
    full = replace(planned.step_cost, dense=planned.step_cost.dense + cache)
    for path in _paths(planned):
        bound = planned.batch / planned.step_cost.seconds(path, rates)
        yield Speed(
            path=path,
            bound=bound,
            bound_full=planned.batch / full.seconds(path, rates),
            expected=roofline.SHARE[path] * bound,
            share=roofline.SHARE[path],
        )


def fastest(planned: Plan, rates: Rates) -> Speed:
    """The better way of serving misses."""
    return max(_speeds(planned, rates), key=lambda speed: speed.expected)


def _quantization(target: StoredModel, source: StoredModel) -> Iterator[Quantization]:
    assumed = target.assumed
    assert assumed is not None
    bytes_in, peak = source.stored, 3 * source.largest + budget.PROCESS_BYTES
    yield Quantization(
        method="nf4" if assumed.kind == "nf4" else "rtn",
        scheme=str(assumed),
        bytes_in=bytes_in,
        bytes_out=target.stored,
        scratch=0,
        peak=peak,
        seconds=bytes_in / REWRITE_BANDWIDTH,
        gpu_seconds=None,
        source="0.256 GB/s, measured on two processors",
    )
    integers = assumed if assumed.kind == "int4" else Scheme(kind="int4")
    work = quantize_cost.work(target.config, _CALIBRATION)
    layers = target.config.num_hidden_layers
    tokens = _TOKEN_ARRAYS * _CALIBRATION * target.config.hidden_size * 4
    in_memory = tokens if tokens <= _ARRAYS_IN_MEMORY else 0
    fitted = StoredModel.assume(target.name, target.config, integers)
    yield Quantization(
        method="gptq",
        scheme=str(integers),
        bytes_in=bytes_in,
        bytes_out=fitted.stored,
        scratch=0 if in_memory else tokens,
        peak=work.peak_bytes + in_memory + budget.PROCESS_BYTES,
        seconds=layers * work.flops / CPU_FLOPS,
        gpu_seconds=work.gpu_seconds(layers),
        source=f"{layers * work.flops / 1e15:.3g} PFLOP at {CPU_FLOPS / 1e9:.0f} GFLOP/s, or "
        f"{quantize_cost.GPU_FLOPS / 1e12:.0f} TFLOP/s on a GPU: by arithmetic",
    )


def _again(planned: Plan, **changes: Any) -> Plan | None:
    asked = {
        "source": planned.model,
        "gpu": planned.gpu,
        "vram": planned.vram,
        "ram": planned.ram,
        "context": planned.context,
        "batch": planned.batch,
        **changes,
    }
    try:
        return plan(asked.pop("source"), **asked)
    except ResourceError:
        return None


def _suggestions(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    if planned.resident:
        return
    now = fastest(planned, rates).expected
    place = "device memory" if planned.gpu else "host memory"
    if planned.resident_context >= 256:
        better = _again(planned, context=planned.resident_context)
        if better is not None:
            yield Suggestion(
                change=f"--ctx {planned.resident_context}",
                yields=f"all experts in {place}, {_rate(better, rates)}",
            )
    yield from _other_schemes(planned, rates)
    if planned.gpu:
        yield from _other_cards(planned, rates)
    if planned.disk:
        held = _again(planned, ram=None)
        if held is not None and held.host_memory.total > (planned.ram or 0):
            yield Suggestion(
                change=f"--ram {_gib(held.host_memory.total)}",
                yields=f"nothing is read from the disk, {_rate(held, rates)} instead of {figure(now)}",
            )


def _other_schemes(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    """Groups of 128 cost fewer bytes than NF4's blocks of 64: named where they keep more experts."""
    config = planned.model.config
    held = planned.slots if planned.gpu else planned.host
    scheme = Scheme(kind="int4")
    other = _again(planned, source=StoredModel.assume(planned.model.name, config, scheme))
    if other is None:
        return
    more = (other.slots if planned.gpu else other.host) - held
    if more > 0:
        yield Suggestion(
            change=f"qmix quantize --method gptq ({scheme.bits_per_weight:.4g} bits a weight)",
            yields=f"{more} more of {planned.experts} experts, {_rate(other, rates)}",
        )


def _other_cards(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    """The smallest cards that hold everything."""
    needed = planned.device_memory.total - planned.device_memory["experts"]
    best: list[gpus.Card] = []
    for card in gpus.CARDS:
        if card.supported and card.vram > (planned.vram or 0):
            other = _again(planned, vram=card.vram)
            if other is not None and other.resident:
                best.append(card)
    for card in sorted(best, key=lambda card: (card.nominal, card.bandwidth))[:2]:
        on_card = replace(rates, device=roofline.Rate(card.read_bandwidth, card.source))
        other = _again(planned, vram=card.vram)
        assert other is not None
        yield Suggestion(
            change=f"a card with {card.nominal} GB ({card.name})",
            yields=f"all experts in device memory, {_rate(other, on_card)}",
        )
    if not best and needed:
        whole = _again(planned, vram=None)
        if whole is not None:
            yield Suggestion(
                change=f"--vram {_gib(whole.device_memory.total)}",
                yields="all experts in device memory",
            )


def _rate(planned: Plan, rates: Rates) -> str:
    speed = fastest(planned, rates)
    return f"about {figure(speed.expected)} tok/s (bound {figure(speed.bound)})"


def figure(value: float) -> str:
    """Two or three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _gib(nbytes: int) -> str:
    return f"{-(-nbytes * 10 // 2**30) / 10:.1f}G"
