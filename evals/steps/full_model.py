"""Tokens a second and memory of 46.7 B random weights in the real layers and loop.

For depth the cache is filled with random keys, which cost no prefill; a step reads just as much.
Knows nothing of kernels.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal

import torch

from qmix.evals.steps.setting import Setting
from qmix.evals.timing import bandwidth, bench, traffic
from qmix.evals.timing.bench import BenchTest
from qmix.tuning import axes


def results(
    setting: Setting,
    weights: str,
    kind: Literal["pp", "tg"],
    tokens: int,
    depth: int = 0,
    batch: int = 1,
    temperature: float = 0.0,
) -> Iterator[dict[str, object]]:
    """What the model needs, then what one test took.

    Args:
        weights: the packed format, `nf4` or `int4`.
        kind, tokens, depth, batch, temperature: see BenchTest.
    """
    bound = setting.copy_bandwidth
    if not setting.holds(weights):
        yield _build(setting, weights)
    model = setting.model(weights)
    test = BenchTest(kind=kind, tokens=tokens, depth=depth, batch=batch, temperature=temperature)
    measured = bench.measure_test(
        model, setting.test(test), setting.widths.repetitions, bound, random_cache=True
    )
    tuning = setting.tunings(weights).of(model.model, model.lm_head, measured.batch)
    yield {
        **asdict(measured),
        "weights": weights,
        "layers": model.config.num_hidden_layers,
        "tuning": axes.changes(tuning),
    }


def _build(setting: Setting, weights: str) -> dict[str, object]:
    """Make the model: its size, and the time that it takes."""
    seconds = bandwidth.seconds(lambda: setting.model(weights), setting.device)
    model = setting.model(weights)
    size = traffic.weight_bytes(model)
    result: dict[str, object] = {
        "test": "build",
        "weights": weights,
        "layers": model.config.num_hidden_layers,
        "bytes": size,
        "bits_per_weight": 8 * size / traffic.weight_count(model),
        "seconds": seconds,
    }
    if setting.device.type == "cuda":
        result["allocated_bytes"] = torch.cuda.memory_allocated(setting.device)
    return result
