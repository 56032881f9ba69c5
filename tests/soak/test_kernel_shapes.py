"""The compiled kernels at odd shapes, each instruction set against float64.

A tensor ends where its weight ends, so that a sanitizer sees a read past it (test_sanitizers).
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from qmix import kernels
from qmix.kernels import Routes
from qmix.kernels.cpu import packed_moe
from qmix.kernels.cpu.library import attends, library
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense
from qmix.weights.expert import Expert
from qmix.weights.packed.layout import pack_expert, unpack_expert
from tests.support.cpu_kernels import random_bytes, random_int4, random_nf4, seeded

pytestmark = pytest.mark.soak


@pytest.fixture(autouse=True)
def _compiled(isa):
    if isa == "torch":
        pytest.skip("torch's own operations are not tested here")


# On either side of every number of tokens at which a kernel does something else.
TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 40)
SOME = TOKENS[::3]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_int8(n, k, groups, zeros=False, perm=False):
    scales = torch.full((n, groups), 0.003, dtype=torch.float16)
    return Affine(
        codes=random_bytes(n, k),
        scales=scales,
        zeros=random_bytes(n, groups, seed=2) if zeros else None,
        perm=torch.randperm(k, generator=seeded(3)).int() if perm else None,
        bits=8,
    )


def of_values(n, k, largest):
    """NF4 with a table that is not NF4's."""
    weight = random_nf4(n, k)
    return replace(weight, table=torch.linspace(-largest, largest, 16))


# Rows of a byte that two rows share, blocks that straddle rows, a chunk's end within a row.
FLAT = ((1, 1), (1, 2), (3, 7), (5, 33), (1, 64), (7, 96), (2, 130), (49, 160), (13, 416))
# Rows, inputs and groups.
GROUPED = ((1, 2, 1), (3, 6, 3), (5, 34, 1), (1, 64, 2), (7, 96, 3), (3, 100, 5), (13, 416, 13))
OTHERS = ("fp4", "e2m1", "iq4")
WEIGHTS = {
    "nf4 of 32": [partial(random_nf4, *shape, block=32) for shape in FLAT],
    "nf4": [partial(random_nf4, *shape) for shape in FLAT],
    "nf4 of 128": [partial(random_nf4, *shape, block=128) for shape in FLAT],
    "nf4 of 4096": [partial(random_nf4, *shape, block=4096) for shape in FLAT],
    "nested": [partial(random_nf4, *shape, nested=True) for shape in (*FLAT, (37, 1056))],
    "nf4 of 16": [partial(random_nf4, *shape, block=16) for shape in FLAT],
    **{kind: [partial(random_nf4, *shape, kind=kind) for shape in FLAT] for kind in OTHERS},
    "small table": [partial(of_values, *shape, 15) for shape in FLAT],
    "huge table": [partial(of_values, *shape, 1e12) for shape in FLAT],
    **{
        f"int4{', zeros' * zeros}{', perm' * perm}": [
            partial(random_int4, *shape, zeros=zeros, perm=perm) for shape in GROUPED
        ]
        for zeros in (False, True)
        for perm in (False, True)
    },
    "int4 in bfloat16": [partial(random_int4, *shape, dtype=torch.bfloat16) for shape in GROUPED],
    "int4 in float32": [
        partial(random_int4, *shape, zeros=True, dtype=torch.float32) for shape in GROUPED
    ],
    "int8": [partial(random_int8, *shape) for shape in GROUPED],
    "int8, zeros, perm": [partial(random_int8, *shape, zeros=True, perm=True) for shape in GROUPED],
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_matmuls(kind):
    for make in WEIGHTS[kind]:
        weight = make()
        dense = weight.dequantize(torch.float32).double()
        for dtype in DTYPES:
            if kind == "huge table" and dtype == torch.float16:
                continue  # no output is finite
            for count in TOKENS:
                x = torch.randn(count, weight.shape[1], generator=seeded(count)).to(dtype)
                out, exact = kernels.linear(x, weight), x.double() @ dense.T
                assert out.dtype == dtype
                error = (out.double() - exact).abs()
                bound = 1e-4 * (x.double().abs() @ dense.abs().T)
                if dtype != torch.float32:  # 16-bit inputs, rounded to the largest of a chunk
                    bound = 1e-4 * x.double().norm(dim=1)[:, None] * dense.norm(dim=1)
                assert (error <= bound + torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_several_weights_at_once():
    for n, k in FLAT:
        weights = [random_nf4(n, k), random_nf4(n + 1, k), random_nf4(n, k, kind="fp4")]
        if k % 2 == 0:
            weights += [random_int4(n, k), random_int4(n, k, perm=True)]
        for count in SOME:
            x = torch.randn(count, k, generator=seeded()).bfloat16()
            outs = kernels.linears(x, weights)
            for out, weight in zip(outs, weights, strict=True):
                assert torch.equal(out, kernels.linear(x, weight))


def silu_expert(x, expert):
    w1, w2, w3 = (
        weight.dequantize(torch.float32).double() for weight in (expert.w1, expert.w2, expert.w3)
    )
    return (torch.nn.functional.silu(x.double() @ w1.T) * (x.double() @ w3.T)) @ w2.T


def summed(x, routes, experts):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for index, expert in enumerate(experts):
        weight = (routes.weights * (routes.ids == index)).sum(-1, keepdim=True)
        out += weight * silu_expert(x, expert)
    return out


def routed(tokens, ids):
    """The same two experts for every token."""
    return Routes(
        torch.tensor([ids]).repeat(tokens, 1), torch.tensor([[0.7, 0.3]]).repeat(tokens, 1)
    )


@pytest.mark.parametrize("kind", ["nf4", "nested", "act-order"])
@pytest.mark.parametrize(("hidden", "width"), [(2, 2), (34, 6), (66, 35), (96, 160), (130, 64)])
def test_experts_of_which_some_have_no_token(kind, hidden, width):
    if kind == "act-order" and width % 2:
        pytest.skip("a row of Int4 has whole bytes")
    make = {
        "nf4": random_nf4,
        "nested": partial(random_nf4, nested=True),
        "act-order": partial(random_int4, zeros=True, perm=True),
    }[kind]
    experts = [
        Expert(w1=make(width, hidden), w2=make(hidden, width), w3=make(width, hidden))
        for _ in range(4)
    ]
    for tokens in SOME:
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            x = torch.randn(tokens, hidden, generator=seeded()).to(dtype)
            routes = routed(tokens, [3, 1])
            out = kernels.experts(x, routes, experts, torch.nn.functional.silu)
            exact = summed(x, routes, experts)
            assert out.shape == exact.shape
            assert ((out - exact).norm(dim=1) <= bound * exact.norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("kind", ["nf4", "int4", "zeros", "perm zeros"])
@pytest.mark.parametrize(("hidden", "width"), [(128, 64), (128, 192), (384, 128)])
def test_packed_experts_of_which_some_have_no_token(kind, hidden, width):
    def make(n, k):
        if kind == "nf4":
            return random_nf4(n, k)
        return random_int4(n, k, k // 64, zeros="zeros" in kind, perm="perm" in kind)

    blobs = [
        pack_expert(Expert(w1=make(width, hidden), w2=make(hidden, width), w3=make(width, hidden)))
        for _ in range(4)
    ]
    experts = [unpack_expert(blob) for blob in blobs]
    for tokens in SOME:
        x = torch.randn(tokens, hidden, generator=seeded())
        routes = routed(tokens, [3, 1])
        out, exact = packed_moe.experts(x, routes, blobs), summed(x, routes, experts)
        assert ((out - exact).norm(dim=1) <= 3e-4 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("width", [1, 2, 7, 16, 33, 64, 80, 128, 130])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 1), (8, 2), (10, 2), (5, 5)])
def test_attention(width, heads, groups):
    for batch in (1, 3):
        for positions in (1, 2, 15, 16, 17, 127, 128, 129, 300):
            q = torch.randn(batch, heads, 1, width, generator=seeded()).bfloat16()
            room = torch.randn(2, batch, groups, positions + 5, width, generator=seeded(1))
            k, v = room.bfloat16()[:, :, :, :positions]
            if not attends(q, k, v):
                k, v = k.contiguous(), v.contiguous()
            assert attends(q, k, v)
            scores = torch.einsum(
                "bhd,bhld->bhl",
                q[:, :, 0].double(),
                k.double().repeat_interleave(heads // groups, 1),
            )
            shares = (scores / width**0.5).softmax(-1)
            exact = torch.einsum(
                "bhl,bhld->bhd", shares, v.double().repeat_interleave(heads // groups, 1)
            )
            out = library().attend(q, k, v)[:, :, 0]
            assert (out - exact).abs().max() <= 2**-7 * max(1, float(exact.abs().max()))


@pytest.mark.parametrize("inputs", [1, 2, 15, 31, 32, 33, 64, 100, 257])
def test_bfloat16_weights_and_norms(inputs):
    for rows in (1, 2, 5, 33):
        weight = torch.randn(rows, inputs, generator=seeded()).bfloat16()
        for count in (0, 1, 2, 3):
            x = torch.randn(count, inputs, generator=seeded(1)).bfloat16()
            with torch.no_grad():
                out = kernels.linear(x, Dense(weight))
            exact = x.double() @ weight.double().T
            size = x.double().abs() @ weight.double().abs().T
            assert ((out - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * size).all()
        x, gain = torch.randn(2, rows, inputs, generator=seeded(2)).bfloat16()
        exact = x.double() * gain[0].double() / (x.double().pow(2).mean(-1, True) + 1e-5).sqrt()
        out = library().rms_norm(x.contiguous(), gain[0].contiguous(), 1e-5)
        assert ((out - exact).abs() <= 2**-7 * exact.abs()).all()
