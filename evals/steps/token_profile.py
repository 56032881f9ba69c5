"""Where the microseconds of one token go, kernel by kernel beside its bound.

A kernel's bound is the bytes that it must read over the copy bandwidth. A kernel that reads next to
nothing has no bound, and all its time is overhead. Knows the kernels by name.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from qmix.evals.steps.graph_timing import timed_as_is
from qmix.evals.steps.setting import Setting
from qmix.evals.timing import bench
from qmix.generation.static_decoder import StaticDecoder
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.nn.decoder_layer import DecoderLayer

LAYERS = 8  # of 32: the launches repeat, and building takes a quarter of the time
DEPTHS = (0, 4096)
_TOKENS = 10


def results(setting: Setting, weights: str) -> Iterator[dict[str, object]]:
    """One result for each kernel and depth, for the gaps, and for the whole step.

    Args:
        weights: the packed format, `nf4` or `int4`.
    """
    bound = setting.copy_bandwidth
    setting.release()
    model = setting.packed_model(weights, LAYERS)
    tokens = 1 if setting.is_rehearsal else _TOKENS
    activity = ProfilerActivity.CPU if setting.is_rehearsal else ProfilerActivity.CUDA
    for depth in sorted({min(depth, setting.widths.most_tokens - 1) for depth in DEPTHS}):
        cache = model.new_cache(1, depth + 2 * tokens)
        bench.fill_cache(cache, depth)
        reads = _reads(model, cache)
        for record in (False, True):
            decoder = StaticDecoder(model.model, model.lm_head, cache, record=record)

            def decode_step(decoder: StaticDecoder = decoder, depth: int = depth) -> None:
                decoder.step()
                decoder.seek(depth)

            yield {
                "kernel": "whole step, " + ("graph" if record else "launched one by one"),
                "depth": depth,
                "layers": model.config.num_hidden_layers,
                "microseconds": timed_as_is(decode_step, setting.clock, tokens),
            }
        with torch.profiler.profile(activities=[activity]) as profile:  # of the recorded steps
            for _ in range(tokens):
                decode_step()
            setting.clock.synchronize()
        events = _launches(profile)
        yield {"kernel": "gaps", "depth": depth, "microseconds": _gaps(events) / tokens}
        yield from _kernel_results(events, depth, tokens, reads, bound)


def _reads(model: MixtralForCausalLM, cache: KVCache) -> dict[str, float]:
    """The bytes that each kernel must read for a token."""
    projections, up, down, chosen = 0.0, 0.0, 0.0, model.config.num_experts_per_tok
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, first = layer.self_attn, layer.block_sparse_moe.stored[0]
        assert attention.fused_qkv is not None
        projections += attention.fused_qkv.nbytes + attention.o_proj.stored.nbytes
        up += chosen * (first.w1.nbytes + first.w3.nbytes)
        down += chosen * first.w2.nbytes
    keys, values = cache.storage(0)
    column = (keys[:, :, :1].numel() + values[:, :, :1].numel()) * keys.element_size()
    return {
        "packed_matmul": projections,
        "gate_up": up,
        "down": down,
        "split": len(cache) * column * cache.length,
        "gemv": model.lm_head.stored.nbytes,
    }


def _launches(profile: torch.profiler.profile) -> list[Any]:
    """The device's events, in order of time."""
    events: Any = profile.events()  # type: ignore[no-untyped-call]
    kernels = [event for event in events if event.device_type.name == "CUDA"]
    return sorted(kernels, key=lambda event: float(event.time_range.start))


def _gaps(events: list[Any]) -> float:
    """Microseconds between the first event and the last in which none ran."""
    idle, end = 0.0, None
    for event in events:
        if end is not None:
            idle += max(0.0, event.time_range.start - end)
        end = max(event.time_range.end, end or 0.0)
    return idle


def _kernel_results(
    events: list[Any], depth: int, tokens: int, reads: dict[str, float], bound: float
) -> Iterator[dict[str, object]]:
    """One result for each kernel in the profile, the longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        times[event.name].append(event.device_time)
    for name, launches in sorted(times.items(), key=lambda item: -sum(item[1])):
        microseconds = sum(launches) / tokens
        read = next((size for key, size in reads.items() if key in name), None)
        least = None if read is None else 1e6 * read / bound
        yield {
            "kernel": name[:80],
            "depth": depth,
            "launches": len(launches) / tokens,
            "microseconds": microseconds,
            "bound_microseconds": least,
            "of_bound": None if least is None else least / microseconds,
        }
