"""What would make a plan faster: another context, scheme, GPU or budget, each with its figure.

Each suggestion is a plan of its own. Knows no torch and does not look at the machine.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from qmix.errors import ResourceError
from qmix.kv_format import INT8_KL
from qmix.planning import gpus, roofline
from qmix.planning.byte_sizes import as_option
from qmix.planning.fitting import Fitting
from qmix.planning.plan import Plan, fitted, plan
from qmix.planning.roofline import Rates
from qmix.planning.speed import fastest, figure
from qmix.planning.stored_model import StoredModel
from qmix.weights.scheme import Scheme

_LEAST_CONTEXT = 256  # shorter ones are not worth suggesting
_FEWER_BITS = [tenths / 10 for tenths in range(25, 42)]  # than GPTQ's; --method auto takes no fewer


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Something to change, and what it yields."""

    change: str
    yields: str


def suggestions(
    planned: Plan, rates: Rates, in_bits: Callable[[float], StoredModel]
) -> Iterator[Suggestion]:
    """What would help a plan that does not hold all experts in the fastest memory, or whose longest
    context is not the model's.

    Args:
        in_bits: the model as `--method auto` stores it in so many bits a weight.
    """
    yield from _smaller_cache(planned, rates)
    if planned.resident:
        return
    yield from _shorter_context(planned, rates)
    yield from _other_scheme(planned, rates)
    yield from _fewer_bits(planned, rates, in_bits)
    if planned.gpu:
        yield from _other_gpus(planned, rates)
    if planned.disk:
        yield from _more_host_memory(planned, rates)


def _smaller_cache(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    if planned.model.kv != "16" or planned.model.config.head_dim % 4:
        return
    model = replace(planned.model, kv="int8")
    other = _fitted(replace(planned.fitting, model=model), planned.context)
    if other is None:
        return
    more = other.slots - planned.slots if planned.gpu else other.host - planned.host
    if more > 0:
        yields = f"{more} more of {planned.experts} experts, {_rate(other, rates)}"
    elif planned.resident and other.resident_context > planned.resident_context:
        yields = f"contexts of {other.resident_context} instead of {planned.resident_context}"
    else:
        return
    yield Suggestion(change=f"--kv int8 (KL {INT8_KL:.1g} on the tiny model)", yields=yields)


def _shorter_context(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    if planned.resident_context < _LEAST_CONTEXT:
        return
    shorter = _fitted(planned.fitting, planned.resident_context)
    if shorter is not None:
        place = "device memory" if planned.gpu else "host memory"
        yield Suggestion(
            change=f"--ctx {planned.resident_context}",
            yields=f"all experts in {place}, {_rate(shorter, rates)}",
        )


def _other_scheme(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    """Groups of 128 take fewer bytes than NF4's blocks of 64: suggested if more experts fit."""
    scheme = Scheme(kind="int4")
    model = StoredModel.assume(planned.model.name, planned.model.config, scheme)
    other = _of_model(planned, model)
    if other is None:
        return
    more = other.slots - planned.slots if planned.gpu else other.host - planned.host
    if more > 0:
        yield Suggestion(
            change=f"qmix quantize --method gptq ({scheme.bits_per_weight:.4g} bits a weight)",
            yields=f"{more} more of {planned.experts} experts, {_rate(other, rates)}",
        )


def _fewer_bits(
    planned: Plan, rates: Rates, in_bits: Callable[[float], StoredModel]
) -> Iterator[Suggestion]:
    """The most bits a weight, in tenths, with which all experts fit."""

    def is_too_large(bits: float) -> bool:
        found = _of_model(planned, in_bits(bits))
        return found is None or not found.resident

    fitting = bisect_left(_FEWER_BITS, True, key=is_too_large)
    narrower = _of_model(planned, in_bits(_FEWER_BITS[fitting - 1])) if fitting else None
    if narrower is not None:
        place = "device memory" if planned.gpu else "host memory"
        yield Suggestion(
            change=f"qmix quantize --method auto --bits {_FEWER_BITS[fitting - 1]}",
            yields=f"all experts in {place}, {_rate(narrower, rates)}",
        )


def _other_gpus(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    """The two smallest GPUs that hold everything, or the device memory that would."""
    larger: list[tuple[gpus.Card, Plan]] = []
    for card in gpus.CARDS:
        if card.supported and card.vram > (planned.vram or 0):
            other = _fitted(replace(planned.fitting, vram=card.vram), planned.context)
            if other is not None and other.resident:
                larger.append((card, other))
    larger.sort(key=lambda pair: (pair[0].nominal, pair[0].bandwidth))
    for card, other in larger[:2]:
        card_rates = replace(rates, device=roofline.Rate(card.read_bandwidth, card.source))
        yield Suggestion(
            change=f"a GPU with {card.nominal} GB ({card.name})",
            yields=f"all experts in device memory, {_rate(other, card_rates)}",
        )
    if not larger:
        whole = _fitted(replace(planned.fitting, vram=None), planned.context)
        if whole is not None:
            yield Suggestion(
                change=f"--vram {as_option(whole.device_memory.total)}",
                yields="all experts in device memory",
            )


def _more_host_memory(planned: Plan, rates: Rates) -> Iterator[Suggestion]:
    whole = _fitted(replace(planned.fitting, ram=None), planned.context)
    if whole is None or whole.host_memory.total <= (planned.ram or 0):
        return
    now = figure(fastest(planned, rates).expected)
    yield Suggestion(
        change=f"--ram {as_option(whole.host_memory.total)}",
        yields=f"nothing is read from the disk, {_rate(whole, rates)} instead of {now}",
    )


def _of_model(planned: Plan, model: StoredModel) -> Plan | None:
    """The plan of another model in the same budgets."""
    try:
        return plan(
            model,
            gpu=planned.gpu,
            vram=planned.vram,
            ram=planned.ram,
            context=planned.context,
            batch=planned.batch,
            kv=planned.model.kv,
        )
    except ResourceError:
        return None


def _fitted(fitting: Fitting, context: int) -> Plan | None:
    try:
        return fitted(fitting, context)
    except ResourceError:
        return None


def _rate(planned: Plan, rates: Rates) -> str:
    speed = fastest(planned, rates)
    return f"about {figure(speed.expected)} tok/s (bound {figure(speed.bound)})"
