"""Step `moe`: microseconds of one layer's experts, by tokens and format, at Mixtral's widths.

The weights of several layers take turns, because one layer's chosen experts (182 MB for a token)
would partly stay in the 50 MB cache of an H100. Shape letters: M tokens, D hidden width. Knows
nothing of a model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from qmix.evals.steps.graph_timing import timed
from qmix.evals.timing.random_model import FORMATS, RandomWeights
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.gpu import moe as gpu
from qmix.kernels.gpu.grid import UNTUNED

HIDDEN, WIDTH, EXPERTS, EXPERTS_PER_TOKEN = 4096, 14336, 8, 2
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
LAYERS = 4

WEIGHTS = 3 * HIDDEN * WIDTH  # number of weights of an expert


def random_routes(tokens: int, device: torch.device, seed: int = 0) -> Routes:
    """The routes of every candidate: distinct, equally likely experts, weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed + tokens)
    ids = (
        torch.rand(tokens, EXPERTS, generator=generator)
        .argsort(-1)[:, :EXPERTS_PER_TOKEN]
        .contiguous()
    )
    weights = torch.rand(tokens, EXPERTS_PER_TOKEN, generator=generator) + 0.1
    return Routes(ids.to(device), (weights / weights.sum(-1, keepdim=True)).to(device))


def random_inputs(tokens: int, device: torch.device) -> Tensor:
    """Activations [M, D] of order one."""
    return torch.randn(tokens, HIDDEN, device=device).bfloat16()


def moe_result(
    name: str, bits: float, tokens: int, routes: Routes, calls: Sequence[Callable[[], object]]
) -> dict[str, object]:
    """Time the calls, and give the bytes read, the operations, and the rate of both.

    Args:
        name: of the kernel; ours begin with qmix.
        bits: bits a weight.
    """
    ours = name.startswith("qmix")
    timing = timed(calls, record=not ours or tokens <= UNTUNED.dense_tokens)
    distinct = len(set(routes.ids.flatten().tolist()))
    seconds = timing.microseconds * 1e-6
    read = distinct * WEIGHTS * bits / 8
    return {
        "kernel": name,
        "tokens": tokens,
        "bits_per_weight": bits,
        "distinct_experts": distinct,
        **asdict(timing),
        "gigabytes_per_second": read / seconds / 1e9,
        "teraflops": 2.0 * tokens * EXPERTS_PER_TOKEN * WEIGHTS / seconds / 1e12,
    }


def results(device: torch.device) -> Iterator[dict[str, object]]:
    """One result for each format and number of tokens."""
    layers_by_format: dict[str, list[PackedExperts]] = {}
    for name, tile_format in FORMATS.items():
        weights = RandomWeights(tile_format, device, torch.bfloat16, seed=1)
        layers_by_format[name] = [
            PackedExperts([weights.expert((WIDTH, HIDDEN)) for _ in range(EXPERTS)])
            for _ in range(LAYERS)
        ]
    for tokens in TOKENS:
        x, routes = random_inputs(tokens, device), random_routes(tokens, device)
        for name, layers in layers_by_format.items():
            bits = 8 * layers[0].table.blobs[0][0].nbytes / WEIGHTS
            yield moe_result(f"qmix {name}", bits, tokens, routes, _calls(x, routes, layers))


def _calls(x: Tensor, routes: Routes, layers: list[PackedExperts]) -> list[Callable[[], object]]:
    """The block on the weights of each layer."""

    def call(layer: PackedExperts) -> Callable[[], object]:
        return lambda: gpu.experts(x, routes, layer.table, 0)

    return [call(layer) for layer in layers]
