"""Step `model`: 46.7 B random weights through the real layers and loop: tokens a second and memory.

Depth is made by filling the cache with random keys, which cost nothing to make; what a step reads is
the same. Shape letters: B rows.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict

import torch

from qmix.config import MixtralConfig
from qmix.evals.timing import bench, random_model, traffic
from qmix.evals.timing.bandwidth import copy_bandwidth
from qmix.evals.timing.bench import Test
from qmix.models.causal_lm import MixtralForCausalLM

POSITIONS = 65536
REPETITIONS = 3

# Most valuable first: what the step's time allows is measured.
TESTS = (
    Test(kind="tg", tokens=64),
    Test(kind="tg", tokens=64, batch=8),
    Test(kind="pp", tokens=4096),
    Test(kind="tg", tokens=64, depth=4096),
    Test(kind="tg", tokens=64, batch=2),
    Test(kind="tg", tokens=64, batch=4),
    Test(kind="tg", tokens=64, batch=16),
    Test(kind="pp", tokens=512),
    Test(kind="tg", tokens=64, depth=32768),
    Test(kind="tg", tokens=64, depth=4096, batch=8),
    Test(kind="pp", tokens=16384),
    Test(kind="tg", tokens=64, depth=4096, batch=16),
    Test(kind="pp", tokens=128),
)


def config(**changes: object) -> MixtralConfig:
    """Mixtral-8x7B, with room for 32k of context and what follows."""
    return MixtralConfig(max_position_embeddings=POSITIONS).replace(**changes)


def built(device: torch.device, kind: str = "nf4", **changes: object) -> MixtralForCausalLM:
    """The model, drawn on the device."""
    return random_model.build(config(**changes), random_model.FORMATS[kind], device)


def run(device: torch.device) -> Iterator[dict[str, object]]:
    """What the model takes, then one result a test."""
    bound = copy_bandwidth(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    model = built(device)
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
            found = bench.measure(model, test, REPETITIONS, bound, filled=True)
        except Exception as error:  # the other tests go on
            torch.cuda.empty_cache()
            yield {
                "test": str(test),
                "batch": test.batch,
                "failed": f"{type(error).__name__}: {error}"[:400],
            }
            if "CUDA error" in str(error):
                raise  # nothing works in this process any more
            continue
        yield asdict(found)
