"""A layer in five launches against the same layer in nine, and against torch.

Run by tests/generation/test_static_decoder.py in a process of its own with TRITON_INTERPRET=1. What
only moves into another launch has the same bits. A norm sums in another order and is rounded once,
to float16, where the other way rounds to the model's dtype first: norm_bound is four roundings.
"""

import pytest
import torch

from qmix import kernels
from qmix.kernels import Routes
from qmix.kernels.gpu import fused, pointwise
from qmix.kernels.gpu import moe as gpu
from qmix.kernels.gpu.grid import Tuning
from qmix.weights.expert import Expert
from qmix.weights.packed.layout import pack_expert, pack_matrix
from qmix.weights.packed.table import ExpertTable
from tests.support.interpreter import (
    CONVERSIONS,
    DEVICE,
    DTYPES,
    ROUNDING,
    drawn,
    error,
    skip_without_a_device,
)
from tests.support.packed import act_order, int4, mixed_experts, nf4
from tests.support.soak import one_in

skip_without_a_device()
HIDDEN, WIDTH, HEADS, SHARED, EXPERTS, EPS = 256, 128, 2, 1, 4, 1e-5

pytestmark = [CONVERSIONS, pytest.mark.usefixtures("poison")]


def norm_bound(dtype=torch.float32):
    return 4 * max(ROUNDING[torch.float16], ROUNDING[dtype])


def packed(make, rows, columns, seed=0):
    return pack_matrix(make(rows, columns, seed).to(DEVICE))


def table_of(make):
    if make is mixed_experts:
        return ExpertTable.build([list(map(pack_expert, mixed_experts(WIDTH, HIDDEN, DEVICE)))])
    experts = [
        Expert(*(make(n, k, seed=3 * e + i).to(DEVICE) for i, (n, k) in enumerate(SHAPES)))
        for e in range(EXPERTS)
    ]
    return ExpertTable.build([[pack_expert(expert) for expert in experts]])


SHAPES = ((WIDTH, HIDDEN), (HIDDEN, WIDTH), (WIDTH, HIDDEN))


def divided(normed):
    """The norm, with the division that the next product does."""
    return normed.weighted.float() * torch.rsqrt(normed.squares.sum(1, keepdim=True))


def residual(tokens, dtype=torch.float32, seed=1):
    return drawn(tokens, HIDDEN, seed=seed, dtype=dtype), drawn(HIDDEN, seed=2, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_the_first_norm(dtype, scale):
    x, weight = residual(3, dtype)
    x = x * scale
    normed = fused.start_norm(x, weight, EPS)
    assert normed.total is x
    assert torch.equal(normed.scale.frexp().mantissa, torch.full((3,), 0.5, device=DEVICE))
    assert error(divided(normed), kernels.rms_norm(x, weight, EPS)) <= norm_bound(dtype)


def cache_and_table(batch, dtype):
    keys, values = torch.full((2, batch, SHARED, 8, 128), float("nan"), dtype=dtype, device=DEVICE)
    table = kernels.rotary(torch.arange(16, device=DEVICE)[None], 128, 1e4, dtype)
    past = torch.arange(3, 3 + batch, dtype=torch.int32, device=DEVICE)
    return keys, values, *table, past


@pytest.mark.diagonal
@pytest.mark.parametrize("make", [nf4, int4, act_order])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("warps", [4, 2])
def test_rotary_and_cache_behind_q_k_and_v(make, batch, warps):
    """The same bits from a norm that is divided; close to it from one that is not."""
    tuning, dtype = Tuning(warps=warps), torch.float32
    weight = packed(make, (HEADS + 2 * SHARED) * 128, HIDDEN)
    x, norm = residual(batch, dtype)
    normed = pointwise.residual_norm(x, torch.zeros_like(x), norm, EPS, dtype=torch.float16)[1]
    starts = torch.arange(batch, dtype=torch.int32, device=DEVICE)
    arrivals, found = fused.counters(weight.shape[0], DEVICE), []
    for given in (normed, fused.start_norm(x, norm, EPS)):
        keys, values, *places = cache_and_table(batch, dtype)
        q = fused.rotated_qkv(
            given, weight, keys, values, *places, arrivals,
            heads=HEADS, starts=starts, dtype=dtype, tuning=tuning,
        )  # fmt: skip
        found.append((q, keys, values))
        assert not arrivals.any()
    keys, values, *places = cache_and_table(batch, dtype)
    partials = gpu.linear_partials(normed, weight, tuning)
    q = pointwise.rotate_store(
        partials, keys, values, *places, heads=HEADS, starts=starts, dtype=dtype
    )
    for expected, same, close in zip((q, keys, values), *found, strict=True):
        assert torch.equal(same.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(close.isnan(), expected.isnan())
        assert error(close.nan_to_num(), expected.nan_to_num()) <= norm_bound()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", one_in(2, [1, 3, 9]))
@pytest.mark.parametrize("warps", one_in(2, [2, 4]))
def test_residual_norm_and_router_behind_o_proj(tokens, warps, dtype):
    weight, tuning = packed(nf4, HIDDEN, HEADS * 128), Tuning(warps=warps)
    attended = drawn(tokens, HEADS * 128, seed=5).half()
    x, first = residual(tokens, dtype)
    norm, gate = drawn(HIDDEN, seed=6, dtype=dtype), drawn(EXPERTS, HIDDEN, seed=7, dtype=dtype) / 8
    last = fused.start_norm(x, first, EPS)
    arrivals, found = fused.counters(HIDDEN, DEVICE), []
    for _ in range(2):
        found.append(
            fused.project_route(attended, weight, last, norm, EPS, gate, 2, arrivals, tuning)
        )
        assert not arrivals.any()
    (normed, routes), (again, other_routes) = found
    partials = gpu.linear_partials(attended, weight, tuning)
    expected = pointwise.residual_norm_route(x, partials, norm, EPS, gate, 2, dtype=torch.float16)
    assert torch.equal(normed.total, expected.total)
    assert error(divided(normed), expected.normed) <= norm_bound(dtype)
    assert torch.equal(routes.ids, expected.routes.ids)
    assert error(routes.weights, expected.routes.weights) <= norm_bound(dtype)
    for one, two in zip(vars(normed).values(), vars(again).values(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(routes.weights, other_routes.weights)


@pytest.mark.diagonal
@pytest.mark.parametrize("make", [nf4, int4, act_order, mixed_experts])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("warps", [2, 4])
def test_residual_and_norm_behind_the_experts(make, tokens, warps):
    """Experts that no token chose leave blocks without work; they count too."""
    table, tuning = table_of(make), Tuning(warps=warps)
    x, first = residual(tokens, torch.float16)
    norm = drawn(HIDDEN, seed=6, dtype=torch.float16)
    ids = torch.tensor([[1, 3], [3, 1], [3, 1]], device=DEVICE)[:tokens]
    routes = Routes(ids, torch.tensor([[0.75, 0.25]], device=DEVICE).expand(tokens, 2))
    last, arrivals = fused.start_norm(x, first, EPS), fused.counters(HIDDEN, DEVICE)
    normed = fused.add_experts(last, routes, table, norm, EPS, arrivals, tuning)
    assert not arrivals.any()
    half = pointwise.residual_norm(x, torch.zeros_like(x), first, EPS, dtype=torch.float16)[1]
    partials = gpu.expert_partials(half, routes, table, 0, tuning)
    total, expected = pointwise.residual_norm(x, partials, norm, EPS, dtype=torch.float16)
    assert error(normed.total, total) <= norm_bound()
    assert error(divided(normed), expected) <= norm_bound()


@pytest.mark.parametrize("growth", [2.0**-10, 2.0**18])
def test_a_residual_that_changes_its_size_at_once(growth):
    """From one norm to the next, as massive activations come and go: what float16 must bear."""
    x, first = residual(1)
    last = fused.start_norm(x, first, EPS)
    if growth < 1:  # the sum cancels all but a small part
        x = x * (1 + growth)
        last = fused.start_norm(x, first, EPS)
        added = -x / (1 + growth)
    else:
        added = torch.zeros_like(x)
        added[0, 5] = growth
    weight = packed(int4, HIDDEN, 128, seed=3)
    attended = torch.zeros(1, 128, dtype=torch.float16, device=DEVICE)
    last = fused.Normed(last.total + added, last.weighted, last.squares, last.scale)
    gate, arrivals = drawn(EXPERTS, HIDDEN, seed=7), fused.counters(HIDDEN, DEVICE)
    normed, _ = fused.project_route(attended, weight, last, first, EPS, gate, 2, arrivals)
    expected = kernels.rms_norm(last.total, first, EPS)
    assert error(divided(normed), expected) <= 2.0**-8  # bfloat16's rounding
