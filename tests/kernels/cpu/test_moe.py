"""The experts of a prompt in one call of the compiled kernels, on every instruction set."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.kernels import Routes
from qmix.kernels.cpu import matmul
from qmix.kernels.cpu.library import library
from qmix.kernels.moe import moe_forward
from qmix.weights.dense import Dense
from qmix.weights.expert import Expert
from tests.support.cpu_kernels import (
    View,
    random_affine,
    random_int4,
    random_nf4,
    random_table,
    seeded,
)
from tests.support.models import threads

HIDDEN, WIDTH, EXPERTS = 256, 448, 5
WEIGHTS = {
    "nf4": random_nf4,
    "nested": partial(random_nf4, nested=True),
    "int4": lambda n, k: random_int4(n, k, k // 64, zeros=True),
    "act-order": lambda n, k: random_int4(n, k, k // 64, zeros=True, perm=True),
    "e2m1": random_table,
    "biases": partial(random_affine, group=64, biases=torch.float16),
    "int8": partial(random_affine, bits=8, group=16, scales="8 bits of 16"),
    "int3": partial(random_affine, bits=3, group=64, biases=torch.bfloat16),
    "int6": partial(random_affine, bits=6, group=16, scales="8 bits of 16"),
}


def random_expert(kind, index=0):
    """No two experts have the same codes."""
    make = WEIGHTS[kind]
    gate, down, up = make(WIDTH, HIDDEN), make(HIDDEN, WIDTH), make(WIDTH, HIDDEN)
    gate.codes.copy_(gate.codes.roll(index))
    return Expert(gate, down, up)


def random_experts(kind):
    return [random_expert(kind, index) for index in range(EXPERTS)]


def routed(tokens, chosen=2, unused=()):
    """Routes of a prompt, no token to an expert of `unused`."""
    used = torch.tensor([e for e in range(EXPERTS) if e not in unused])
    ids = torch.stack(
        [used[torch.randperm(len(used), generator=seeded(t))[:chosen]] for t in range(tokens)]
    )
    shares = torch.rand(tokens, chosen, generator=seeded(9)) + 0.1
    return Routes(ids, shares / shares.sum(1, keepdim=True))


def prompt(tokens, dtype=torch.bfloat16):
    return torch.randn(tokens, HIDDEN, generator=seeded(3)).to(dtype)


def exact(x, routes, experts):
    """In float64, nothing rounded."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for index, expert in enumerate(experts):
        share = (routes.weights.double() * (routes.ids == index)).sum(1, keepdim=True)
        w1, w2, w3 = (w.dequantize(torch.float32).double() for w in vars(expert).values())
        out += share * ((F.silu(x.double() @ w1.T) * (x.double() @ w3.T)) @ w2.T)
    return out


def error(out, oracle):
    """The mean square of the errors beside that of the outputs, as a root."""
    return float((out.double() - oracle).norm() / oracle.norm())


@pytest.mark.parametrize("kind", WEIGHTS)
def test_they_are_more_exact_than_one_after_another(isa, kind):
    """Because values of 16 bits are rounded three times less."""
    experts = random_experts(kind)
    for tokens, unused in ((17, ()), (90, (0, 3))):
        routes = routed(tokens, unused=unused)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = prompt(tokens, dtype)
            out, oracle = kernels.experts(x, routes, experts, F.silu), exact(x, routes, experts)
            assert (out.dtype, out.shape) == (dtype, x.shape)
            apart = moe_forward(x, routes, experts, F.silu, matmul.linears)
            if isa == "torch":
                assert torch.equal(out, apart)
            elif dtype == torch.float32:
                assert error(out, oracle) <= 2e-6
            else:
                bound = 3e-4 if dtype == torch.float16 else 3e-3
                assert error(out, oracle) <= min(bound, 0.85 * error(apart, oracle))


@pytest.mark.parametrize("kind", ["nf4", "act-order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_and_how_experts_come_change_no_bit(isa, kind, dtype):
    """One by one or together; the experts of 700 tokens are too many for one turn."""
    if isa == "torch":
        pytest.skip("torch's own matmuls are not tested here")
    experts = random_experts(kind)
    for tokens in (20, 700):
        x, routes = prompt(tokens, dtype), routed(tokens, unused=(2,))
        view = View(experts)
        outs = [kernels.experts(x, routes, view, F.silu, resident=False)]
        assert view.asked == [0, 1, 3, 4]
        for count in (1, 2, 3, 5, 16):
            with threads(count):
                outs.append(kernels.experts(x, routes, experts, F.silu))
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_one_expert_may_take_all_tokens(isa):
    experts = random_experts("nf4")
    for tokens in (40, 600):
        x, routes = prompt(tokens), Routes(torch.full((tokens, 1), 4), torch.ones(tokens, 1))
        out = kernels.experts(x, routes, experts, F.silu)
        assert error(out, exact(x, routes, experts)) <= 5e-3


def test_a_token_without_numbers_is_alone_with_that(isa):
    x, routes, experts = prompt(50), routed(50), random_experts("int4")
    clean = kernels.experts(x, routes, experts, F.silu)
    x[7, 3], x[31, 100] = torch.nan, torch.inf
    out = kernels.experts(x, routes, experts, F.silu)
    assert out[[7, 31]].isnan().all()
    others = [row for row in range(50) if row not in (7, 31)]
    assert torch.equal(out[others], clean[others])


def test_what_memory_held_before_does_not_matter(isa):
    x, routes, experts = prompt(60), routed(60), random_experts("act-order")
    clean = kernels.experts(x, routes, experts, F.silu)
    for _ in range(3):
        poison = [torch.full((size,), torch.nan) for size in (1 << 14, 1 << 17, 1 << 18, 1 << 20)]
        del poison
        assert torch.equal(kernels.experts(x, routes, experts, F.silu), clean)


@pytest.fixture
def calls(compiled, monkeypatch):
    """The names of the compiled functions as they are called."""
    names = []
    plain = type(library().functions).call
    monkeypatch.setattr(
        type(library().functions),
        "call",
        lambda self, name, *rest: names.append(name) or plain(self, name, *rest),
    )
    return names


def test_all_of_a_prompts_experts_are_one_call(calls):
    kernels.experts(prompt(100), routed(100), random_experts("nf4"), F.silu)
    assert calls == ["add_experts"]


def test_others_are_multiplied_one_after_another_as_before(calls):
    """Dense experts, other activations, gradients, and many rows of float32."""
    x, routes = prompt(40), routed(40)
    experts = random_experts("nf4")
    mixed = [Expert(Dense(e.w1.dequantize(torch.bfloat16)), e.w2, e.w3) for e in experts]
    many = prompt(2000, torch.float32), routed(2000)
    learns = x.clone().requires_grad_()
    for given, act, chosen in (
        ((x, routes), F.silu, mixed),
        ((x, routes), F.gelu, experts),
        ((learns, routes), F.silu, experts),
        (many, F.silu, experts),
    ):
        out = kernels.experts(*given, chosen, act)
        assert "add_experts" not in calls
        one_by_one = moe_forward(*given, chosen, act, kernels.linears)
        assert torch.equal(out, one_by_one)
        assert out.requires_grad == given[0].requires_grad
    assert torch.autograd.grad(out_of(learns, routes, experts), learns)[0].abs().sum() > 0


def out_of(x, routes, experts):
    return kernels.experts(x, routes, experts, F.silu).float().sum()
