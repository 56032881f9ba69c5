"""Step `model`: tokens a second and memory of 46.7 B random weights in the real layers and loop.

For depth the cache is filled with random keys, which cost no prefill; a step reads just as much.
Knows nothing of kernels.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from qmix.config import MixtralConfig
from qmix.evals.timing import bench, random_model, traffic
from qmix.evals.timing.bandwidth import copy_bandwidth
from qmix.evals.timing.bench import BenchTest
from qmix.models.causal_lm import MixtralForCausalLM

POSITIONS = 65536
REPETITIONS = 3

# The most valuable tests first: as many are measured as the step's time allows.
TESTS = (
    BenchTest(kind="tg", tokens=64),
    BenchTest(kind="tg", tokens=64, batch=8),
    BenchTest(kind="pp", tokens=4096),
    BenchTest(kind="tg", tokens=64, depth=4096),
    BenchTest(kind="tg", tokens=64, batch=2),
    BenchTest(kind="tg", tokens=64, batch=4),
    BenchTest(kind="tg", tokens=64, batch=16),
    BenchTest(kind="pp", tokens=512),
    BenchTest(kind="tg", tokens=64, depth=32768),
    BenchTest(kind="tg", tokens=64, depth=4096, batch=8),
    BenchTest(kind="pp", tokens=16384),
    BenchTest(kind="tg", tokens=64, depth=4096, batch=16),
    BenchTest(kind="pp", tokens=128),
)


def config(**changes: object) -> MixtralConfig:
    """Mixtral-8x7B, with positions for 32k of context and the tokens after it."""
    return MixtralConfig(max_position_embeddings=POSITIONS).replace(**changes)


def build_model(device: torch.device, **changes: object) -> MixtralForCausalLM:
    """The model with random NF4 weights, made on the device."""
    return random_model.build_random_model(config(**changes), random_model.NF4, device)


def results(device: torch.device) -> Iterator[dict[str, object]]:
    """What the model needs, then one result for each test."""
    bound = copy_bandwidth(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    model = build_model(device)
    torch.cuda.synchronize(device)
    yield {
        "test": "build",
        "weights": traffic.weight_count(model),
        "bytes": traffic.weight_bytes(model),
        "bits_per_weight": 8 * traffic.weight_bytes(model) / traffic.weight_count(model),
        "seconds": time.perf_counter() - begun,
        "allocated_bytes": torch.cuda.memory_allocated(device),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "copy_bandwidth": bound,
    }
    for test in TESTS:
        try:
            result = bench.measure_test(model, test, REPETITIONS, bound, random_cache=True)
        except Exception as error:  # the other tests still run
            torch.cuda.empty_cache()
            yield {
                "test": str(test),
                "batch": test.batch,
                "failed": f"{type(error).__name__}: {error}"[:400],
            }
            if "CUDA error" in str(error):
                raise  # nothing works in this process any more
            continue
        yield asdict(result)
