"""Step `moe`: microseconds of one layer's experts, by tokens and format, at Mixtral's widths.

Weights are rotated over several layers: one layer's chosen experts (182 MB for a token) would stay in
the 50 MB cache of an H100 in part. Shape letters: M tokens, E experts, D hidden width, F expert width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from qmix.evals.steps.timing import timed
from qmix.evals.timing.random_model import FORMATS, Draw
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.gpu import moe as gpu

HIDDEN, WIDTH, EXPERTS, CHOICES = 4096, 14336, 8, 2
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
LAYERS = 4

WEIGHTS = 3 * HIDDEN * WIDTH  # of an expert


def routes(tokens: int, device: torch.device, seed: int = 0) -> Routes:
    """The draw that every candidate gets: distinct experts, each as likely; weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed + tokens)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :CHOICES].contiguous()
    weights = torch.rand(tokens, CHOICES, generator=generator) + 0.1
    return Routes(ids.to(device), (weights / weights.sum(-1, keepdim=True)).to(device))


def inputs(tokens: int, device: torch.device) -> Tensor:
    """Activations [M, D] of order one."""
    return torch.randn(tokens, HIDDEN, device=device).bfloat16()


def row(
    name: str, bits: float, tokens: int, chosen: Routes, calls: Sequence[Callable[[], object]]
) -> dict[str, object]:
    """Time the calls and say what it means: bytes read, their rate, operations and theirs."""
    ours = name.startswith("qmix")
    took = timed(calls, record=not ours or tokens <= gpu.UNTUNED.dense_tokens)
    distinct = len(set(chosen.ids.flatten().tolist()))
    seconds = took.microseconds * 1e-6
    read = distinct * WEIGHTS * bits / 8
    return {
        "kernel": name,
        "tokens": tokens,
        "bits_per_weight": bits,
        "distinct_experts": distinct,
        **asdict(took),
        "gigabytes_per_second": read / seconds / 1e9,
        "teraflops": 2.0 * tokens * CHOICES * WEIGHTS / seconds / 1e12,
    }


def run(device: torch.device) -> Iterator[dict[str, object]]:
    """One result a format and number of tokens."""
    tables: dict[str, list[PackedExperts]] = {}
    for name, plan in FORMATS.items():
        draw = Draw(plan, device, torch.bfloat16, seed=1)
        tables[name] = [
            PackedExperts([draw.expert((WIDTH, HIDDEN)) for _ in range(EXPERTS)])
            for _ in range(LAYERS)
        ]
    for tokens in TOKENS:
        x, chosen = inputs(tokens, device), routes(tokens, device)
        for name, layers in tables.items():
            blobs = layers[0].table.blobs[0]
            bits = 8 * blobs[0].nbytes / WEIGHTS
            yield row(f"qmix {name}", bits, tokens, chosen, calls_of(x, chosen, layers))


def calls_of(x: Tensor, chosen: Routes, layers: list[PackedExperts]) -> list[Callable[[], object]]:
    """The block on each layer's weights."""

    def call(table: PackedExperts) -> Callable[[], object]:
        return lambda: gpu.experts(x, chosen, table.table, 0)

    return [call(layer) for layer in layers]
