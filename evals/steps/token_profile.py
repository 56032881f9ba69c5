"""Step `profile`: where the microseconds of one token go, kernel by kernel against each one's own bound.

A kernel's bound is the bytes that it must read over the copy bandwidth; a kernel that reads next to
nothing has none, and all its time is overhead.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from qmix.evals.steps import full_model
from qmix.evals.steps.timing import timed_as_is
from qmix.evals.timing import bench, traffic
from qmix.evals.timing.bandwidth import copy_bandwidth
from qmix.generation.static_decoder import StaticDecoder
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache import KVCache
from qmix.nn.decoder_layer import DecoderLayer

LAYERS = 8  # of 32: the launches repeat, and building them takes a fourth
DEPTHS = (0, 4096)
_TOKENS = 10


def run(device: torch.device) -> Iterator[dict[str, object]]:
    """One result a kernel and depth, and the step as a whole with and without a graph."""
    bound = copy_bandwidth(device)
    model = full_model.built(device, num_hidden_layers=LAYERS)
    with torch.no_grad():
        for depth in DEPTHS:
            cache = model.new_cache(1, depth + 64)
            bench.fill(cache, depth)
            reads = _reads(model, cache)
            cache.rewind(depth)
            for record in (True, False):
                step = StaticDecoder(model.model, model.lm_head, cache, record=record)

                def one(step: StaticDecoder = step, depth: int = depth) -> None:
                    step.step()
                    step.seek(depth)

                yield {
                    "kernel": "whole step, " + ("graph" if record else "launched one by one"),
                    "depth": depth,
                    "layers": LAYERS,
                    "microseconds": timed_as_is(one),
                }
                if record:
                    continue
                with torch.profiler.profile(
                    activities=[torch.profiler.ProfilerActivity.CUDA]
                ) as profile:
                    for _ in range(_TOKENS):
                        one()
                    torch.cuda.synchronize(device)
                yield from _rows(profile, depth, reads, bound)


def _reads(model: MixtralForCausalLM, cache: KVCache) -> dict[str, float]:
    """Bytes a token that each kernel must read."""
    found = traffic.of_step(model, torch.zeros(1, 1, dtype=torch.int64, device=model.device), cache)
    projections, up, down = 0.0, 0.0, 0.0
    for layer in model.model.layers:
        assert isinstance(layer, DecoderLayer)
        attention, first = layer.self_attn, layer.block_sparse_moe.stored[0]
        assert attention.fused_qkv is not None
        projections += attention.fused_qkv.nbytes + attention.o_proj.stored.nbytes
        up += found.distinct * (first.w1.nbytes + first.w3.nbytes)
        down += found.distinct * first.w2.nbytes
    return {
        "packed_matmul": projections,
        "gate_up": up,
        "down": down,
        "split": found.cache,
        "gemv": model.lm_head.stored.nbytes,
    }


def _rows(
    profile: torch.profiler.profile, depth: int, reads: dict[str, float], bound: float
) -> Iterator[dict[str, object]]:
    times: dict[str, list[float]] = defaultdict(list)
    events: Any = profile.events()  # type: ignore[no-untyped-call]
    for event in events:
        if event.device_type.name == "CUDA":
            times[event.name].append(event.device_time)
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
        microseconds = sum(each) / _TOKENS
        read = next((size for key, size in reads.items() if key in name), None)
        least = None if read is None else 1e6 * read / bound
        yield {
            "kernel": name[:80],
            "depth": depth,
            "launches": len(each) / _TOKENS,
            "microseconds": microseconds,
            "bound_microseconds": least,
            "of_bound": None if least is None else least / microseconds,
        }
