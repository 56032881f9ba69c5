"""Every Triton kernel of ours on a small problem, with what it means in float64.

A case runs the kernels that some function of qmix.kernels.gpu launches and compares. Bounds are of
the norm of the error relative to the oracle's; see tests/kernels/interpreted_experts.py and
tests/kernels/interpreted_attention.py for how they are derived.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.kernels import Routes
from qmix.kernels.gpu import attention, fused, moe, pointwise
from qmix.weights.expert import Expert
from qmix.weights.packed.layout import pack_expert, pack_matrix
from qmix.weights.packed.table import ExpertTable
from tests.support.packed import OTHERS, act_order, affine, as_computed, int4, nf4

ORDER = 1e-5  # float32 sums in another order
HALF = 2.0**-11  # one rounding to float16
EPSILON = {torch.float32: ORDER, torch.float16: HALF, torch.bfloat16: 2.0**-8}

# How a weight is made, and the bound of one matmul with it against its exact values.
WEIGHTS = {
    "nf4": (nf4, 1.82e-4 + HALF),
    "nf4 128": (lambda n, k, seed=0: nf4(n, k, seed, block=128), 1.82e-4 + HALF),
    "int4 g64": (int4, HALF),
    "int4 g128": (lambda n, k, seed=0: int4(n, k, seed, group=128), HALF),
    "int4 asymmetric g64": (lambda n, k, seed=0: int4(n, k, seed, symmetric=False), HALF),
    "int4 asymmetric g128": (
        lambda n, k, seed=0: int4(n, k, seed, group=128, symmetric=False),
        HALF,
    ),
    "int4 act-order": (act_order, HALF),
    # Tables, scales or zeros, and scaled weights of groups of 16 are rounded each.
    "own table": (OTHERS["own table"], 2 * HALF),
    "e2m1 g16": (OTHERS["e2m1 b16"], 2 * HALF),
    "int2 biases g16": (OTHERS["int2 biases g16"], 3 * HALF),
    "int4 biases g32": (OTHERS["int4 biases"], 2 * HALF),
    "int8 asymmetric": (OTHERS["int8 asymmetric"], HALF),
    "int8 g32": (lambda n, k, seed=0: affine(n, k, seed, bits=8, how="symmetric"), HALF),
    "int6 nested g16": (OTHERS["int6 nested g16"], 2 * HALF),
    "int2 g64": (OTHERS["int2 g64"], HALF),
    "int3 g128": (OTHERS["int3 g128"], HALF),
    "int5 biases g32": (OTHERS["int5 biases"], 2 * HALF),
}


@dataclass(frozen=True)
class Result:
    """What a kernel computed, what it means, and how far the two may be apart."""

    what: str
    found: torch.Tensor
    expected: torch.Tensor
    bound: float

    def error(self):
        """The norm of the difference, relative; infinite where something is no number."""
        found, expected = self.found.double(), self.expected.double()
        assert found.shape == expected.shape, (self.what, found.shape, expected.shape)
        if not torch.isfinite(found).all():
            return float("inf")
        return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()

    def is_right(self):
        return self.error() <= self.bound


def drawn(*shape, seed=1, dtype=torch.float32):
    """Normal values that are float16."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.half().to(dtype)


def linear(weights, tokens, shape=(128, 1152), tuning=moe.UNTUNED):
    """packed_matmul and combine: one panel, K in two splits with more tiles than stages."""
    make, bound = WEIGHTS[weights]
    weight = make(*shape)
    packed, x = pack_matrix(weight), drawn(tokens, shape[1])
    out = moe.linear(x, packed, tuning)
    exact, computed = (
        x.double() @ each.double().T
        for each in (weight.dequantize(torch.float32), as_computed(packed))
    )
    return [Result("linear", out, exact, bound), Result("linear's sums", out, computed, ORDER)]


def dequantize(weights, dtype=torch.float32):
    """dequantize: two panels of two or four tiles."""
    make, _ = WEIGHTS[weights]
    packed = pack_matrix(make(256, 256))
    expected = as_computed(packed)
    if packed.perm is not None:  # inputs stay in the order in which they are packed
        expected = expected[:, packed.perm.long()]
    bound = EPSILON[dtype] + (HALF if packed.format.group else 0)  # scaled weights stay float32
    return [Result("dequantize", moe.dequantize(packed, dtype), expected, bound)]


def _table(weights, hidden, width, count=4):
    make, bound = WEIGHTS[weights]
    experts = [
        Expert(make(width, hidden, s), make(hidden, width, s + 1), make(width, hidden, s + 2))
        for s in range(0, 10 * count, 10)
    ]
    table = ExpertTable.build([[pack_expert(expert) for expert in experts]])
    return [(each.w1, each.w2, each.w3) for each in experts], table, bound


def _routes(tokens, count=4, choices=2):
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(count, generator=generator) for _ in range(tokens)])
    weights = torch.rand(tokens, choices, generator=generator) + 0.1
    return Routes(ids[:, :choices].contiguous(), weights / weights.sum(-1, keepdim=True))


def experts(weights, tokens, hidden=384, width=256, tuning=moe.UNTUNED):
    """gate_up, down and combine: four experts, two a token."""
    stored, table, bound = _table(weights, hidden, width)
    x, routes = drawn(tokens, hidden), _routes(tokens)
    out = moe.experts(x, routes, table, 0, tuning)

    def meant(weight, kept):
        return _mixed(x.double(), routes, [[weight(w) for w in each] for each in stored], kept)

    exact = meant(lambda weight: weight.dequantize(torch.float32).double(), torch.float64)
    computed = meant(lambda weight: as_computed(pack_matrix(weight)).double(), torch.float16)
    return [
        Result("experts", out, exact, 3 * bound + HALF),
        Result("experts' sums", out, computed, 1e-4),  # some inner values round the other way
    ]


def _mixed(x, routes, experts, kept):
    """Each token through its experts (w1, w2, w3), whose inner activations are of dtype `kept`."""
    total = torch.zeros_like(x)
    for number, (w1, w2, w3) in enumerate(experts):
        inner = moe.SHRINK * F.silu(x @ w1.T) * (x @ w3.T)
        share = (routes.weights * (routes.ids == number)).sum(1, keepdim=True).double()
        total += share / moe.SHRINK * (inner.to(kept).double() @ w2.T)
    return total


def attend(dtype, queries, length=67, window=None, heads=(8, 2, 64), arrivals=False):
    """split and merge, or split alone with `arrivals`, or prefill; one row has padding."""
    count, shared, width = heads
    q = drawn(2, queries, count, width, dtype=dtype)
    keys = drawn(2, shared, length, width, seed=2, dtype=dtype)
    values = drawn(2, shared, length, width, seed=3, dtype=dtype)
    past = torch.tensor([length - queries, length - queries - 5], dtype=torch.int32)
    starts = torch.tensor([0, 9], dtype=torch.int32)
    counters = torch.zeros(2 * shared, dtype=torch.int32) if arrivals else None
    out = attention.attend_cached(
        q, keys, values, past, starts=starts, window=window, arrivals=counters
    )
    assert counters is None or not counters.any()
    column = torch.arange(length)
    rows = []
    for row in range(2):
        at = past[row] + torch.arange(queries)[:, None]
        seen = (column <= at) & (column >= starts[row])
        if window is not None:
            seen &= column > at - window
        k, v = (t[row].double().repeat_interleave(count // shared, 0) for t in (keys, values))
        scores = q[row].double().transpose(0, 1) @ k.transpose(1, 2) / width**0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        rows.append((weights @ v).transpose(0, 1))
    return [Result("attention", out, torch.stack(rows), 2 * EPSILON[dtype])]


def norms(dtype, tokens, hidden=384):
    """residual_norm in its three forms: alone, after partial sums, and with the router."""
    x, weight = drawn(tokens, hidden, dtype=dtype) * 3, drawn(hidden, seed=2, dtype=dtype)
    partials = drawn(2, 2 * tokens, hidden, seed=3)
    gate = drawn(8, hidden, seed=4, dtype=dtype) / 8
    added = x.double() + partials.double().view(2, tokens, 2, hidden).sum((0, 2)).to(dtype)
    found = pointwise.residual_norm_route(x, partials, weight, 1e-5, gate, 2, dtype=torch.float16)
    total, normed = pointwise.residual_norm(x, partials, weight, 1e-5)
    logits = found.normed.double() @ gate.double().T
    best = found.logits.double().topk(2)
    epsilon = EPSILON[dtype]
    return [
        Result("norm", pointwise.rms_norm(x, weight, 1e-5), _norm(x, weight), 3 * epsilon),
        Result("total", total, added, 2 * epsilon),
        Result("norm of total", normed, _norm(total, weight), 3 * epsilon),
        Result("total before the router", found.total, total, 0.0),
        Result("norm before the router", found.normed, _norm(total, weight), 3 * epsilon + HALF),
        Result("logits", found.logits, logits, 3 * epsilon + HALF),
        Result(
            "chosen logits", found.logits.gather(1, found.routes.ids.clamp(0, 7)), best.values, 0.0
        ),
        Result("routing weights", found.routes.weights, best.values.softmax(-1), ORDER),
    ]


def _norm(x, weight):
    x = x.double()
    return weight.double() * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


def route(dtype, tokens):
    """route: eight experts, two a token."""
    logits = drawn(tokens, 8, dtype=dtype) * 3
    routes = pointwise.route(logits, 2)
    best = logits.double().topk(2)
    return [
        Result("chosen logits", logits.gather(1, routes.ids), best.values, 0.0),
        Result("routing weights", routes.weights, best.values.softmax(-1), ORDER),
    ]


def rotary(dtype, tokens, width=64):
    """rotate and rotate_store: four query heads, two of keys, a ring that has rolled."""
    positions = torch.arange(tokens + 40)[None]
    cos, sin = kernels.rotary(positions, width, 1e4, dtype)
    x = drawn(1, tokens, 4, width, dtype=dtype).transpose(1, 2)
    turned = pointwise.apply_rotary(x, cos[:, :, :tokens], sin[:, :, :tokens])
    slots, partials = tokens + 3, drawn(2, tokens, 8 * width, seed=5)
    keys, values = torch.zeros(2, 1, 2, slots, width, dtype=dtype)
    past = torch.tensor([5], dtype=torch.int32)
    starts = torch.tensor([2], dtype=torch.int32)
    q = pointwise.rotate_store(
        partials, keys, values, cos, sin, past, heads=4, starts=starts, dtype=dtype
    )
    heads = partials.double().sum(0).to(dtype).view(1, tokens, 8, width).transpose(1, 2)
    angles = slice(3, 3 + tokens)
    rotated = _rotated(heads[:, :6], cos[:, :, angles], sin[:, :, angles])
    slot = torch.arange(5, 5 + tokens) % slots
    bound = 3 * EPSILON[dtype]
    return [
        Result("rotate", turned, _rotated(x, cos[:, :, :tokens], sin[:, :, :tokens]), bound),
        Result("queries", q.transpose(1, 2), rotated[:, :4], bound),
        Result("stored keys", keys[:, :, slot], rotated[:, 4:], bound),
        Result("stored values", values[:, :, slot], heads[:, 6:], bound),
    ]


def _rotated(x, cos, sin):
    low, high = x.double().chunk(2, -1)
    return x.double() * cos.double() + torch.cat((-high, low), -1) * sin.double()


def fused_layer(weights, dtype, tokens, hidden=256, width=128, tuning=moe.UNTUNED):
    """The fused launches: start_norm, matmul_rotate_store, matmul_add_route, gate_up, down_add."""
    make, bound = WEIGHTS[weights]
    bound = bound + 4 * EPSILON[dtype]
    x, first, second, third = (
        drawn(rows, hidden, seed=seed, dtype=dtype) for seed, rows in enumerate((tokens, 1, 1, 1))
    )
    first, second, third = first[0], second[0], third[0]
    start = fused.start_norm(x, first, 1e-5)
    qkv, o_proj, gate = (
        make(512, hidden),
        make(hidden, hidden, 1),
        drawn(4, hidden, dtype=dtype) / 8,
    )
    cos, sin = kernels.rotary(torch.arange(16)[None], 128, 1e4, dtype)
    keys, values = torch.zeros(2, tokens, 1, 16, 128, dtype=dtype)
    past = torch.arange(tokens, dtype=torch.int32) % 8
    arrivals = fused.counters(max(512, hidden), x.device)
    q = fused.rotated_qkv(
        start, pack_matrix(qkv), keys, values, cos, sin, past, arrivals,
        heads=2, dtype=dtype, tuning=tuning,
    )  # fmt: skip
    attended = drawn(tokens, hidden, seed=5, dtype=torch.float16)
    added, routes = fused.project_route(
        attended, pack_matrix(o_proj), start, second, 1e-5, gate, 2, arrivals, tuning
    )
    stored, table, _ = _table(weights, hidden, width)
    last = fused.add_experts(added, routes, table, third, 1e-5, arrivals, tuning)
    assert not arrivals.any()

    def exact(weight):
        return weight.dequantize(torch.float32).double()

    heads = (_norm(x, first) @ exact(qkv).T).view(tokens, 1, 4, 128).transpose(1, 2)
    places = (table[0, 0, past.long()][:, None, None] for table in (cos, sin))
    turned = _rotated(heads[:, :3], *places)
    at = (torch.arange(tokens), 0, past.long())
    total = x.double() + attended.double() @ exact(o_proj).T
    router = _norm(added.total, second)
    best = (router @ gate.double().T).topk(2)
    mixed = _mixed(router, routes, [[exact(w) for w in each] for each in stored], torch.float64)
    return [
        Result("queries", q.transpose(1, 2), turned[:, :2], bound),
        Result("stored keys", keys[at], turned[:, 2, 0], bound),
        Result("stored values", values[at], heads[:, 3, 0], bound),
        Result("total", added.total, total, bound),
        Result("norm", _divided(added), router, 3 * EPSILON[dtype] + HALF),
        Result("routing weights", routes.weights, best.values.softmax(-1), 4 * EPSILON[dtype]),
        Result("total after experts", last.total, added.total.double() + mixed, 3 * bound),
        Result("norm after experts", _divided(last), _norm(last.total, third), 3 * EPSILON[dtype] + HALF),
    ]  # fmt: skip


def _divided(normed):
    """The norm, with the division that the next product does."""
    return normed.weighted.double() * normed.squares.double().sum(1, keepdim=True).rsqrt()
