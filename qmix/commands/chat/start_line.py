"""What a chat says before its first prompt, and the speed that memory allows it.

Knows files by their headers, and a model by its store.
"""

from dataclasses import dataclass, replace

from qmix.commands.chat.loading import ModelSource
from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.planner import rates_here
from qmix.commands.session import Session
from qmix.experts.statistics import Statistics
from qmix.formats import open_checkpoint
from qmix.generation.config import GenerationConfig
from qmix.planning.plan import plan
from qmix.planning.roofline import DecodePath
from qmix.planning.stored_model import StoredModel
from qmix.quantities import weights


def start_line(source: ModelSource, session: Session, width: int = 80) -> str:
    """Model, parameters, bits, memory, context, template and temperature.

    Args:
        width: of the terminal, in columns; the line is broken between its parts.
    """
    stored = inspect(source.directory)
    parts = (
        source.identity.name,
        weights(stored.parameters),
        f"{stored.bits_per_weight:.2f} bits",
        _memory(session),
        f"context {session.context:,}",
        f"{session.format.name} template",
        _temperature(session.config),
    )
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]} · {part}"
        lines[-1:] = [longer] if len(longer) <= width else [lines[-1], f"  {part}"]
    return "\n".join(lines)


def _temperature(config: GenerationConfig) -> str:
    """The temperature, and who says so."""
    by = config.given.get("temperature", "the default")
    if not config.do_sample:
        by = config.given.get("do_sample", by)
    by = "qmix's default" if by in ("qmix", "the default") else f"from {by}"
    if not config.do_sample:
        return f"temperature 0 (greedy, {by})"
    return f"temperature {config.temperature:g} ({by})"


def _memory(session: Session) -> str:
    """Bytes of the weights, and where they are."""
    resident = f"{_size(session.model.get_memory_footprint())} on {session.model.device}"
    store = session.model.store
    if store is None:
        return resident
    statistics = store.statistics()
    places = ((statistics.device_slots, "on the GPU"), (statistics.host, "in RAM"))
    tiers = [
        f"experts {_size(count * statistics.expert_bytes)} {place}"
        for count, place in places
        if count
    ]
    if statistics.disk:
        tiers.append(f"{_size(statistics.disk * statistics.expert_bytes)} on disk")
    return ", ".join([resident, *tiers])


def _size(nbytes: int) -> str:
    gib = nbytes / (1 << 30)
    return f"{gib:.1f} GiB" if gib >= 0.1 else f"{nbytes / (1 << 20):.1f} MiB"


@dataclass(frozen=True)
class Bound:
    """The most tokens a second that memory allows, and what its bandwidths are taken from."""

    tokens_per_s: float
    source: str


def bound(source: ModelSource, session: Session, experts: Statistics | None) -> Bound:
    """The bound of one row at the conversation's length.

    Args:
        experts: what an offloaded model's store has done: its hit rate sets the bound.
    """
    model = session.model
    on_gpu = model.device.type == "cuda"
    dtype = str(model.dtype).removeprefix("torch.")
    stored = StoredModel.of(open_checkpoint(source.directory).metadata, dtype)
    planned = plan(stored, gpu=on_gpu, vram=None, ram=None, context=None, batch=1)
    stats = session.stats
    positions = stats.context_tokens if stats else 0
    read = planned.step_cost.dense + stored.kv_bytes(positions)
    cost = replace(planned.step_cost, dense=read, wait_s=0.0)
    path: DecodePath = "resident" if on_gpu else "host"
    if experts is not None:
        cold = experts.disk_bytes / max(experts.tokens * cost.activations * cost.expert, 1)
        cost = replace(cost, hit=experts.hit_rate, cold=min(cold, 1.0))
        path = "host and disk" if not on_gpu else "cpu" if experts.path == "cpu" else "interconnect"
    rates = rates_here()
    rate = rates.device if on_gpu else rates.host
    return Bound(1 / cost.seconds(path, rates), f"{rate.bandwidth / 1e9:,.0f} GB/s, {rate.source}")
