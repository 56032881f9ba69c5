"""What is told of a model in this process: its size, its place, and the speed that memory allows.

Knows files by their headers, and experts by their store.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from qmix.commands.chat.chat_model import Bound
from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.planner import rates_here
from qmix.experts.statistics import Statistics
from qmix.formats import open_checkpoint
from qmix.planning.plan import plan
from qmix.planning.roofline import DecodePath
from qmix.planning.stored_model import StoredModel
from qmix.quantities import weights

if TYPE_CHECKING:
    from qmix.commands.chat.local_model import LocalModel
    from qmix.models.causal_lm import MixtralForCausalLM


def facts(model: "LocalModel") -> tuple[str, ...]:
    """Name, parameters, bits, memory, context and template."""
    stored = inspect(model.source.directory)
    return (
        model.identity.name,
        weights(stored.parameters),
        f"{stored.bits_per_weight:.2f} bits",
        _memory(model.causal_lm),
        f"context {model.context:,}",
        f"{model.format.name} template",
    )


def _memory(model: "MixtralForCausalLM") -> str:
    """Bytes of the weights, and where they are."""
    resident = f"{_size(model.get_memory_footprint())} on {model.device}"
    store = model.store
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


def bound(model: "LocalModel", positions: int, experts: Statistics | None) -> Bound:
    """The bound of one row that goes on behind so many positions.

    Args:
        experts: what an offloaded model's store has done: its hit rate sets the bound.
    """
    on_gpu = model.causal_lm.device.type == "cuda"
    dtype = str(model.causal_lm.dtype).removeprefix("torch.")
    stored = StoredModel.of(open_checkpoint(model.source.directory).metadata, dtype)
    stored = replace(stored, kv=model.cache.kv)
    planned = plan(stored, gpu=on_gpu, vram=None, ram=None, context=None, batch=1)
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
