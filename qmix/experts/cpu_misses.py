"""A decode step whose hits the device multiplies, and whose misses the CPU multiplies in place.

Activations are copied to the host and outputs back; no weight moves. Knows no store.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qmix.kernels import PackedExperts, Routes
from qmix.kernels.cpu import packed_moe
from qmix.kernels.gpu import packed_matmul


@dataclass(frozen=True, eq=False)
class SplitOutput:
    """The output [T, D]; the experts that the CPU read for it, and the seconds that this took."""

    out: Tensor
    missed: Sequence[int]
    seconds: float


def forward(
    x: Tensor, routes: Routes, experts: PackedExperts, in_slot: Sequence[bool]
) -> SplitOutput:
    """Each token [T, D] through its chosen SwiGLU experts.

    The CPU's inputs are copied down before the hits are launched, so that it multiplies the misses
    while the device multiplies the hits. The sum is in the order of a token's choices, as in the
    device's kernels.

    Args:
        in_slot: for each of the E experts, whether the device has it; the blobs of the others are
            read on the CPU.
    """
    host_ids = routes.ids.cpu()
    missed = torch.tensor([[not in_slot[expert] for expert in row] for row in host_ids.tolist()])
    on_host = None
    if bool(missed.any()):
        on_host = x.cpu(), Routes(host_ids, routes.weights.cpu())
    on_cpu = missed.to(x.device)
    out = torch.zeros(*routes.ids.shape, x.shape[1], dtype=torch.float32, device=x.device)
    if not bool(missed.all()):
        ids = routes.ids.masked_fill(on_cpu, in_slot.index(True))
        weights = routes.weights.masked_fill(on_cpu, 0)
        out += packed_matmul.expert_pairs(x, Routes(ids, weights), experts)
    read: Sequence[int] = ()
    seconds = 0.0
    if on_host is not None:
        begun = time.perf_counter()
        outputs, read = pairs_on_host(*on_host, experts, missed)
        seconds = time.perf_counter() - begun
        out[on_cpu] = outputs.to(x.device)
    return SplitOutput(out.sum(1).to(x.dtype), read, seconds)


def pairs_on_host(
    x: Tensor, routes: Routes, experts: PackedExperts, chosen: Tensor
) -> tuple[Tensor, list[int]]:
    """The outputs of the (token, choice) pairs that `chosen`, bool [T, k], marks, from host blobs.

    Returns:
        float32 [pairs, D], each times its routing weight; and the experts that were read.
    """
    out = torch.zeros(*routes.ids.shape, x.shape[1], dtype=torch.float32)
    indices: list[int] = torch.unique(routes.ids[chosen]).tolist()
    for index in indices:
        token, choice = torch.where((routes.ids == index) & chosen)
        pair_routes = Routes(routes.ids[token, choice, None], routes.weights[token, choice, None])
        out[token, choice] = packed_moe.experts(x[token], pair_routes, experts.packed)
    return out[chosen], indices
