"""The answer of `qmix plan` in words. Knows what it says, and not how it was computed."""

from dataclasses import replace

from qmix.commands.planner import PlanAnswer
from qmix.kv_format import INT8_KL, NF4_KL
from qmix.planning.budget import MemoryBreakdown
from qmix.planning.byte_sizes import show
from qmix.planning.estimate import Estimate, Quantization
from qmix.planning.plan import Plan
from qmix.planning.speed import Speed, figure, rates_used
from qmix.printable import escaped
from qmix.quantities import counted

# Nobody decodes a single row faster than this: a step's launches take longer than its bytes.
_FASTEST = 1000
_PATHS = {
    "resident": "all experts in device memory",
    "interconnect": "misses read over PCIe",
    "cpu": "misses computed on the CPU",
    "host": "everything in host memory",
    "host and disk": "misses read from the disk",
}
_RATES = {"device": "device", "interconnect": "PCIe", "host": "host", "disk": "disk"}


def text(answer: PlanAnswer) -> str:
    """The answer for a person to read."""
    estimate = answer.estimate
    planned, model = estimate.plan, estimate.plan.model
    how = "as stored" if model.assumption is None else f"as {model.assumption}, assumed"
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    batch = f", batch {planned.batch}" if planned.batch > 1 else ""
    lines = [
        f"{model.name}: {counted(layers, 'layer')} of {counted(experts, 'expert')}, {how}",
        f"on {answer.place}, context {planned.context}{batch}",
        "",
        *_verdict(estimate),
        "",
    ]
    if planned.gpu:
        lines += _memory("device memory", planned.device_memory, planned.vram)
        widened = planned.fitting.footprint.widened
        lines += [] if widened is None else [f"  {widened}"]
        lines.append("")
    lines += _memory("host memory", planned.host_memory, planned.ram)
    lines += ["", *_speeds(estimate), *_cache(planned)]
    lines += map(_quantization, estimate.quantization)
    lines += [f"would help  {each.change}: {each.yields}" for each in estimate.suggestions]
    lines += [f"note        {note}" for note in answer.notes]
    return "\n".join(map(escaped, lines)) + "\n"


def _verdict(estimate: Estimate) -> list[str]:
    """Whether it fits and how fast it will be, then the largest contexts."""
    planned = estimate.plan
    best = max(estimate.speeds, key=lambda speed: speed.expected)
    speed = f"about {figure(best.expected)} tokens a second"
    if best.bound > _FASTEST:
        speed = "so small that launches and not bytes decide its speed"
    place = "device memory" if planned.gpu else "host memory"
    if planned.resident:
        fits = f"fits: all {planned.experts} experts in {place}"
    elif planned.gpu:
        slots = f"{planned.slots} of {planned.experts} in device memory"
        fits = f"fits with experts on the host: {slots}, {planned.host} in host memory"
        if planned.disk:
            fits += f", {planned.disk} only on the disk"
    else:
        fits = f"fits with the disk: {planned.host} of {planned.experts} experts in host memory"
        fits += f", {planned.disk} read from the file when needed"
    contexts = f"largest context {planned.largest_context}"
    if planned.resident_context and planned.resident_context < planned.largest_context:
        contexts += f"; {planned.resident_context} with all experts in {place}"
    return [f"{fits}; {speed}", contexts]


def _memory(title: str, breakdown: MemoryBreakdown, budget: int | None) -> list[str]:
    limit = "" if budget is None else f" of {show(budget)}"
    return [
        f"{title:26} {show(breakdown.total):>12}{limit}",
        *(f"  {item.what:24} {show(item.nbytes):>12}" for item in breakdown.items if item.nbytes),
    ]


def _speeds(estimate: Estimate) -> list[str]:
    lines = [_speed(speed) for speed in estimate.speeds]
    for name in rates_used(estimate.speeds):
        rate = getattr(estimate.rates, name)
        lines.append(f"{_RATES[name]:11} {figure(rate.bandwidth / 1e9)} GB/s ({rate.source})")
    return lines


def _speed(speed: Speed) -> str:
    return (
        f"decode      {_PATHS[speed.path]}: bound {figure(speed.bound)} tok/s "
        f"({figure(speed.bound_full)} with the context full); the goal, "
        f"{100 * speed.share:.0f} % of it, is {figure(speed.expected)}"
    )


def _cache(planned: Plan) -> list[str]:
    """What a cache in 8 bits saves and costs, where that is planned."""
    if planned.model.kv == "16":
        return []
    context, batch = planned.context, planned.batch
    plain = replace(planned.model, kv="16")
    saved = plain.kv_bytes(context, batch) - planned.model.kv_bytes(context, batch)
    return [
        f"KV cache    8 bits take {show(saved)} less than 16; KL {INT8_KL:.1g} nats a token on the "
        f"tiny model, {INT8_KL / NF4_KL:.0%} of what NF4's weights cost it"
    ]


def _quantization(cost: Quantization) -> str:
    scratch = f", {show(cost.scratch)} more while it runs" if cost.scratch else ""
    device = f", {_time(cost.gpu_seconds)} on a large GPU" if cost.gpu_seconds else ""
    return (
        f"quantize    --method {cost.method}: {show(cost.bytes_in)} read, {show(cost.bytes_out)} "
        f"written{scratch}, {show(cost.peak)} of memory, {_time(cost.seconds)} on two processors"
        f"{device} ({cost.source})"
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
