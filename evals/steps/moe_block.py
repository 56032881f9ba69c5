"""Microseconds of one layer's experts, by tokens and format, at Mixtral's widths.

Shape letters: M tokens, D hidden width. Knows nothing of a model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from qmix.evals.steps.graph_timing import timed
from qmix.evals.steps.setting import Setting
from qmix.evals.timing.random_model import FORMATS, RandomWeights
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.gpu import moe as gpu
from qmix.kernels.gpu.grid import UNTUNED

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)


def random_routes(setting: Setting, tokens: int) -> Routes:
    """The routes of every candidate: distinct, equally likely experts, weights that sum to 1."""
    config = setting.widths.config
    experts, chosen = config.num_local_experts, config.num_experts_per_tok
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :chosen].contiguous()
    weights = torch.rand(tokens, chosen, generator=generator) + 0.1
    weights /= weights.sum(-1, keepdim=True)
    return Routes(ids.to(setting.device), weights.to(setting.device))


def random_inputs(setting: Setting, tokens: int) -> Tensor:
    """Activations [M, D] of order one."""
    widths = setting.widths
    x = torch.randn(tokens, widths.config.hidden_size, device=setting.device)
    return x.to(widths.dtype)


def tokens_of(setting: Setting, tokens: Sequence[int]) -> list[int]:
    """The numbers of tokens that are measured in this setting."""
    return sorted({min(count, setting.widths.most_tokens) for count in tokens})


def moe_result(
    setting: Setting,
    name: str,
    bits: float,
    tokens: int,
    routes: Routes,
    calls: Sequence[Callable[[], object]],
) -> dict[str, object]:
    """Time the calls, and give the bytes read, the operations, and the rate of both.

    Args:
        name: of the kernel; ours begin with qmix.
        bits: bits a weight.
    """
    ours, weights = name.startswith("qmix"), setting.widths.expert_weights
    record = not ours or tokens <= UNTUNED.dense_tokens
    timing = timed(calls, setting.clock, record=record)
    distinct = len(set(routes.ids.flatten().tolist()))
    seconds = timing.microseconds * 1e-6
    return {
        "kernel": name,
        "tokens": tokens,
        "bits_per_weight": bits,
        "distinct_experts": distinct,
        **asdict(timing),
        "gigabytes_per_second": distinct * weights * bits / 8 / seconds / 1e9,
        "teraflops": 2.0 * routes.ids.numel() * weights / seconds / 1e12,
    }


def results(setting: Setting) -> Iterator[dict[str, object]]:
    """One result for each format and number of tokens."""
    setting.release()
    widths = setting.widths
    config = widths.config
    layers_by_format: dict[str, list[PackedExperts]] = {}
    for name, tile_format in FORMATS.items():
        weights = RandomWeights(tile_format, setting.device, widths.dtype, seed=1)
        shape = (config.intermediate_size, config.hidden_size)
        layers_by_format[name] = [
            PackedExperts([weights.expert(shape) for _ in range(config.num_local_experts)])
            for _ in range(widths.turns)
        ]
    for tokens in tokens_of(setting, TOKENS):
        x, routes = random_inputs(setting, tokens), random_routes(setting, tokens)
        for name, layers in layers_by_format.items():
            bits = 8 * layers[0].table.blobs[0][0].nbytes / widths.expert_weights
            calls = _calls(x, routes, layers)
            yield moe_result(setting, f"qmix {name}", bits, tokens, routes, calls)


def _calls(x: Tensor, routes: Routes, layers: list[PackedExperts]) -> list[Callable[[], object]]:
    """The block on the weights of each layer."""

    def call(layer: PackedExperts) -> Callable[[], object]:
        return lambda: gpu.experts(x, routes, layer.table, 0)

    return [call(layer) for layer in layers]
