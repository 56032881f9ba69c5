"""Every instruction set of the compiled CPU kernels against `x @ w.dequantize().T`."""

import os
import warnings
from dataclasses import replace

import pytest
import torch

from qmix import kernels
from qmix.kernels import Routes, pointwise
from qmix.kernels.cpu import functions
from qmix.kernels.cpu.library import library
from qmix.weights.dense import Dense
from qmix.weights.expert import Expert
from qmix.weights.table import Table
from tests.support.cpu_kernels import View, random_int4, random_nf4, seeded
from tests.support.models import TINY
from tests.support.process import succeeds

TOKENS = (1, 2, 4, 7, 12, 13, 33)


def check(weight, dtypes=(torch.float32, torch.bfloat16, torch.float16), tokens=TOKENS):
    """Equal to float32 rounding for float32; to well below the output's own for 16 bits."""
    dense = weight.dequantize(torch.float32)
    scale = dense.norm(dim=1)
    for dtype in dtypes:
        for count in tokens:
            x = torch.randn(count, weight.shape[1], generator=seeded(5)).to(dtype)
            oracle = x.double() @ dense.double().T
            out = kernels.linear(x, weight)
            assert out.dtype == dtype
            assert out.shape == oracle.shape
            error = (out.double() - oracle).abs() / (scale * x.double().norm(dim=1, keepdim=True))
            # A tile's lane adds up a unit, which leaves the inputs of a table 13 bits.
            eps = 3e-7 if dtype == torch.float32 else 3e-5 if count <= 12 else 8e-5
            # What rounding the output costs, which no kernel can avoid.
            unavoidable = (oracle.to(dtype).double() - oracle).abs() / (
                scale * x.double().norm(dim=1, keepdim=True)
            )
            assert (error <= 2 * unavoidable + eps).all(), (dtype, count, float(error.max()))


@pytest.mark.parametrize("block", [32, 64, 128, 256, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_nf4_of_every_block_size(isa, block, nested):
    check(random_nf4(50, 384, block, nested), tokens=(1, 3, 13))


@pytest.mark.parametrize(
    "shape", [(1, 64), (7, 33), (3, 7), (130, 96), (61, 448), (49, 1056), (300, 1024)]
)
def test_ragged_shapes(isa, shape):
    check(random_nf4(*shape))
    if shape[1] % 2 == 0:
        check(random_int4(*shape), tokens=(1, 5, 33))


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16, 12])
@pytest.mark.parametrize("zeros", [False, True])
def test_int4_of_every_group_size(isa, groups, zeros):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check(
            random_int4(50, 1536 if groups == 12 else 512, groups, zeros, dtype=dtype),
            tokens=(1, 4, 13),
        )


def test_act_order_permutes_the_activations(isa):
    check(random_int4(50, 512, 4, zeros=True, perm=True), tokens=(1, 13))


def test_fp4_has_its_own_table(isa):
    check(random_nf4(50, 256, kind="fp4"), tokens=(1, 13))


def test_float16_scales_that_are_zero_or_subnormal(isa):
    weight = random_int4(50, 512, 4)
    values = torch.tensor([0.0, 2.0**-24, -(2.0**-20), 65504.0], dtype=torch.float16)
    check(replace(weight, scales=values.expand(50, 4).contiguous()), (torch.float32,), (1, 13))
    assert not kernels.linear(
        torch.ones(2, 512), replace(weight, scales=torch.zeros_like(weight.scales))
    ).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_that_are_zero_huge_or_poisoned(isa, dtype):
    weight = random_nf4(50, 512)
    x = torch.zeros(5, 512, dtype=dtype)
    x[1, 3], x[2] = 1e-38, 1e30
    x[3, 200], x[4, 500] = float("nan"), float("inf")
    for rows in (x, x.repeat(4, 1)):
        out = kernels.linear(rows, weight).float()
        assert not out[0].any()
        assert torch.isfinite(out[:3]).all()
        oracle = x[2].float() @ weight.dequantize(torch.float32).T
        assert torch.allclose(out[2], oracle, rtol=0.02, atol=1e-2 * float(oracle.abs().max()))
        assert out[3].isnan().all()
        assert not torch.isfinite(out[4]).any()


def test_empty_and_strided_inputs(isa):
    weight = random_nf4(50, 256)
    assert kernels.linear(torch.empty(0, 256), weight).shape == (0, 50)
    x = torch.randn(2, 3, 512, generator=seeded())[..., ::2]
    assert torch.equal(kernels.linear(x, weight), kernels.linear(x.contiguous(), weight))


def test_what_memory_held_before_does_not_matter(isa):
    weight = random_nf4(50, 416)
    x = torch.randn(13, 416)
    clean = [kernels.linear(x[:count], weight) for count in (1, 13)]
    for _ in range(3):
        poison = [
            torch.full((size,), float("nan")) for size in (13 * 50, 50, 13 * 512, 1 << 16, 1 << 20)
        ]
        del poison
        for count, expected in zip((1, 13), clean, strict=True):
            assert torch.equal(kernels.linear(x[:count], weight), expected)


def test_threads_and_repetition_change_no_bit(isa):
    if isa == "torch":
        pytest.skip("torch's own matmuls are not tested here")
    before = torch.get_num_threads()
    weights = [
        random_nf4(2099, 512, nested=True),
        random_int4(2099, 512, 4, zeros=True),
        random_int4(1050, 1024, 8),  # sixteen threads take smaller tiles of it
    ]  # threaded
    try:
        for weight in weights:
            for count in (1, 4, 33):
                x = torch.randn(count, weight.shape[1], generator=seeded())
                for rows in (x, x.bfloat16()):
                    outs = []
                    for threads in (1, 2, 3, 5, 16, 2):
                        torch.set_num_threads(threads)
                        outs.append(kernels.linear(rows, weight))
                    assert all(torch.equal(out, outs[0]) for out in outs)
    finally:
        torch.set_num_threads(before)


def test_several_weights_at_once_are_as_each_alone(isa):
    weights = [random_nf4(70, 256), random_int4(30, 256, 2), random_int4(50, 256, 2, perm=True)]
    for count in (1, 13, 600):
        x = torch.randn(count, 256, generator=seeded()).bfloat16()
        outs = kernels.linears(x, weights)
        assert all(
            torch.equal(out, kernels.linear(x, weight))
            for out, weight in zip(outs, weights, strict=True)
        )


def test_experts_match_the_oracle(isa):
    experts = [
        Expert(random_nf4(96, 64), random_nf4(64, 96, nested=True), random_nf4(96, 64))
        for _ in range(4)
    ]
    for tokens in (1, 9, 40):
        ids = torch.stack([torch.randperm(4, generator=seeded(i))[:2] for i in range(tokens)])
        routes = Routes(ids, torch.tensor([[0.7, 0.3]]).expand(tokens, 2))
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            x = torch.randn(tokens, 64, generator=seeded()).to(dtype)
            out = kernels.experts(x, routes, experts, torch.nn.functional.silu)
            with kernels.override("reference"):
                oracle = kernels.experts(x, routes, experts, torch.nn.functional.silu)
            assert (out - oracle).abs().max() <= bound * oracle.abs().max()


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (8, 64), (41, 4096), (300, 1000)])
def test_one_or_two_tokens_with_a_bfloat16_weight(isa, shape):
    weight = torch.randn(shape, generator=seeded()).bfloat16()
    for count in (1, 2, 3):
        x = torch.randn(count, shape[1], generator=seeded(1)).bfloat16()
        with torch.no_grad():
            out = kernels.linear(x, Dense(weight))
        oracle = x.double() @ weight.double().T
        assert (out.dtype, out.shape) == (torch.bfloat16, oracle.shape)
        bound = 2**-8 * oracle.abs() + 1e-6 * float(x.double().norm() * weight.double().norm())
        assert ((out.double() - oracle).abs() <= bound).all()


def test_a_bfloat16_weight_that_learns_is_torchs_affair(isa):
    weight = torch.nn.Parameter(torch.randn(8, 64, generator=seeded()).bfloat16())
    x = torch.randn(1, 64, generator=seeded(1)).bfloat16()
    kernels.linear(x, Dense(weight)).sum().backward()
    assert torch.equal(weight.grad, x.expand(8, 64))


@pytest.mark.parametrize("width", [1, 37, 64, 4096])
def test_norms_of_one_or_two_tokens_are_torchs(isa, width):
    x = 3 * torch.randn(2, 3, width, generator=seeded()).bfloat16()
    weight = torch.randn(width, generator=seeded(1)).bfloat16()
    for rows in (x[0, :1], x[0, :2], x[:, 0]):
        out = kernels.rms_norm(rows, weight, 1e-5)
        assert torch.allclose(out, pointwise.rms_norm(rows, weight, 1e-5), rtol=2**-7, atol=0)
    assert (
        kernels.rms_norm(torch.full((1, width), torch.inf).bfloat16(), weight, 1e-5).isnan().all()
    )


EXPERTS = {
    "nf4": lambda n, k: random_nf4(n, k),
    "nested": lambda n, k: random_nf4(n, k, nested=True),
    "int4": lambda n, k: random_int4(n, k, 4),
    "act-order": lambda n, k: random_int4(n, k, 2, zeros=True, perm=True),
    "bfloat16": lambda n, k: Dense(torch.randn(n, k, generator=seeded(n)).bfloat16() / k**0.5),
}


@pytest.mark.parametrize(
    "kinds", [(kind, kind, kind) for kind in EXPERTS] + [("nf4", "bfloat16", "int4")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_tokens_experts_are_those_of_the_oracle_and_of_a_view(isa, kinds, dtype):
    experts = [
        Expert(
            EXPERTS[kinds[0]](320, 128), EXPERTS[kinds[1]](128, 320), EXPERTS[kinds[2]](320, 128)
        )
        for _ in range(4)
    ]
    if "bfloat16" in kinds and dtype != torch.bfloat16:
        pytest.skip("dense weights have their model's dtype")
    routes = Routes(torch.tensor([[3, 0, 2]]), torch.tensor([[0.5, 0.2, 0.3]]))
    x = torch.randn(1, 128, generator=seeded()).to(dtype)
    silu = torch.nn.functional.silu
    out = kernels.experts(x, routes, experts, silu)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    with kernels.override("reference"):
        oracle = kernels.experts(x, routes, experts, silu)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (out - oracle).abs().max() <= bound * oracle.abs().max()
    view = View(experts)
    assert torch.equal(kernels.experts(x, routes, view, silu, resident=False), out)
    assert view.asked == [0, 2, 3]
    x[0, 5] = torch.nan
    assert kernels.experts(x, routes, experts, silu).isnan().all()


def test_the_gate_opens_and_closes_as_torchs(isa):
    """Gates from the smallest to the largest float32s that a model could have."""
    width = 4096
    codes = torch.zeros(width // 2, dtype=torch.uint8)
    eye = [
        Table(codes.repeat(2), torch.ones(1), torch.ones(16), (width, 1), torch.float32, width)
    ] * 2
    down = Table(codes, torch.ones(1), torch.ones(16), (1, width), torch.float32, width)
    routes = Routes(torch.tensor([[0]]), torch.ones(1, 1))
    for value in (
        -1e30,
        -200.0,
        -88.5,
        -87.0,
        -10.0,
        -1e-3,
        -1e-30,
        0.0,
        1e-30,
        0.5,
        10.0,
        89.0,
        1e15,
    ):
        x = torch.tensor([[value]])
        out = kernels.experts(x, routes, [Expert(eye[0], down, eye[1])], torch.nn.functional.silu)
        expected = width * torch.nn.functional.silu(x.double()) * x.double()
        assert torch.allclose(out.double(), expected, rtol=1e-5, atol=1e-30), value


def test_gradients_pass_through(isa):
    weight = random_nf4(50, 256)
    x = torch.randn(3, 256, requires_grad=True)
    kernels.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.dequantize(torch.float32).sum(0).expand(3, -1), atol=1e-5)
    with torch.no_grad():
        assert not kernels.linear(x, weight).requires_grad


def test_what_falls_back_is_counted(isa):
    before = library().fallbacks
    kernels.linear(torch.ones(1, 256), random_nf4(50, 256))
    kernels.linears(torch.ones(1, 256), [random_nf4(50, 256), random_int4(50, 256)])
    assert library().fallbacks - before == (3 if isa == "torch" else 0)


@pytest.mark.usefixtures("compiled")
def test_a_forked_child_multiplies():
    weight, x = random_nf4(2099, 512), torch.randn(4, 512, generator=seeded())
    expected = kernels.linear(x, weight)  # libgomp's threads live from here on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking where threads live
        child = os.fork()
    if not child:
        alike = torch.equal(kernels.linear(x, weight), expected)
        library.cache_clear()
        os._exit(0 if alike and torch.equal(kernels.linear(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.usefixtures("compiled")
def test_the_threads_are_torchs_own():
    found = library()
    assert functions.torch_threads() == found.functions.fork
    memory = torch.arange(1 << 18, dtype=torch.int64)
    expected = 0
    for value in memory.tolist():
        expected ^= value
    assert found.read(memory) == expected


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_tiny_model_says_what_the_oracle_says(tiny_nf4, dtype):
    from qmix import load

    model = load(tiny_nf4, device="cpu", torch_dtype=getattr(torch, dtype))[0]
    ids = torch.randint(3, 2048, (1, 9), generator=seeded())
    with torch.no_grad():
        for count in (1, 9):
            fast = model(input_ids=ids[:, :count]).logits.double().log_softmax(-1)
            with kernels.override("reference"):
                oracle = model(input_ids=ids[:, :count]).logits.double().log_softmax(-1)
            divergence = (oracle.exp() * (oracle - fast)).sum(-1).max()
            assert divergence < (1e-8 if dtype == "float32" else 5e-3)


def test_one_thread_by_environment_works():
    code = (
        "import torch; from qmix import kernels; from qmix.weights.nf4 import quantize;"
        "w = quantize(torch.randn(300, 256)); x = torch.randn(3, 256);"
        "assert torch.get_num_threads() == 1;"
        "assert torch.allclose(kernels.linear(x, w), x @ w.dequantize(torch.float32).T, atol=1e-4)"
    )
    succeeds(code, environment={"OMP_NUM_THREADS": "1"})
    assert TINY.is_dir()


@pytest.mark.parametrize("form", ["nf4", "int4"])
def test_gradients_are_those_of_the_dequantized_weight(form):
    """The forward pass is the very one without gradients; the backward pass is float32 tiles."""
    weight = random_nf4(96, 128) if form == "nf4" else random_int4(96, 128, 2, perm=True)
    x = torch.randn(3, 128, generator=seeded(), requires_grad=True)
    out = kernels.linear(x, weight)
    assert torch.equal(out, kernels.linear(x.detach(), weight))
    grad = torch.randn(3, 96, generator=seeded(1))
    out.backward(grad)
    assert torch.allclose(x.grad, grad @ weight.dequantize(torch.float32), rtol=1e-5, atol=1e-5)
