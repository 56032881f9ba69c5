"""Step `profile`: where the microseconds of one token go, kernel by kernel beside its bound.

A kernel's bound is the bytes that it must read over the copy bandwidth. A kernel that reads next to
nothing has no bound, and all its time is overhead. Knows the kernels by name.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from qmix.evals.steps import full_model
from qmix.evals.steps.graph_timing import timed_as_is
from qmix.evals.timing import bench, traffic
from qmix.evals.timing.bandwidth import copy_bandwidth
from qmix.generation.static_decoder import StaticDecoder
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.nn.decoder_layer import DecoderLayer

LAYERS = 8  # of 32: the launches repeat, and building takes a quarter of the time
DEPTHS = (0, 4096)
_TOKENS = 10


def results(device: torch.device) -> Iterator[dict[str, object]]:
    """One result for each kernel and depth, and for the whole step with and without a graph."""
    bound = copy_bandwidth(device)
    model = full_model.build_model(device, num_hidden_layers=LAYERS)
    with torch.no_grad():
        for depth in DEPTHS:
            cache = model.new_cache(1, depth + 64)
            bench.fill_cache(cache, depth)
            reads = _reads(model, cache)
            cache.rewind(depth)
            for record in (True, False):
                decoder = StaticDecoder(model.model, model.lm_head, cache, record=record)

                def decode_step(decoder: StaticDecoder = decoder, depth: int = depth) -> None:
                    decoder.step()
                    decoder.seek(depth)

                yield {
                    "kernel": "whole step, " + ("graph" if record else "launched one by one"),
                    "depth": depth,
                    "layers": LAYERS,
                    "microseconds": timed_as_is(decode_step),
                }
                if record:
                    continue
                with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]
                ) as profile:
                    for _ in range(_TOKENS):
                        decode_step()
                    torch.cuda.synchronize(device)
                yield from _kernel_results(profile, depth, reads, bound)


def _reads(model: MixtralForCausalLM, cache: KVCache) -> dict[str, float]:
    """The bytes that each kernel must read for a token."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    step = traffic.step_traffic(model, ids, cache)
    projections, up, down = 0.0, 0.0, 0.0
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, first = layer.self_attn, layer.block_sparse_moe.stored[0]
        assert attention.fused_qkv is not None
        projections += attention.fused_qkv.nbytes + attention.o_proj.stored.nbytes
        up += step.distinct_experts * (first.w1.nbytes + first.w3.nbytes)
        down += step.distinct_experts * first.w2.nbytes
    return {
        "packed_matmul": projections,
        "gate_up": up,
        "down": down,
        "split": step.cache,
        "gemv": model.lm_head.stored.nbytes,
    }


def _kernel_results(
    profile: torch.profiler.profile, depth: int, reads: dict[str, float], bound: float
) -> Iterator[dict[str, object]]:
    """One result for each kernel in the profile, the longest first."""
    times: dict[str, list[float]] = defaultdict(list)
    events: Any = profile.events()  # type: ignore[no-untyped-call]
    for event in events:
        if event.device_type.name == "CUDA":
            times[event.name].append(event.device_time)
    for name, launches in sorted(times.items(), key=lambda item: -sum(item[1])):
        microseconds = sum(launches) / _TOKENS
        read = next((size for key, size in reads.items() if key in name), None)
        least = None if read is None else 1e6 * read / bound
        yield {
            "kernel": name[:80],
            "depth": depth,
            "launches": len(launches) / _TOKENS,
            "microseconds": microseconds,
            "bound_microseconds": least,
            "of_bound": None if least is None else least / microseconds,
        }
