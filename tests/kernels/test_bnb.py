"""bitsandbytes as a backend: which weights it takes, its results, and why it may be of no use."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.errors import UnsupportedError
from qmix.kernels import bnb, trial
from qmix.kernels.trial import Draw, weight_of
from qmix.weights.expert import Expert
from qmix.weights.nf4 import quantize
from qmix.weights.scheme import Scheme
from qmix.weights.table import Table
from tests.support.oracles import needs_bitsandbytes
from tests.support.packed import int4

CPU = torch.device("cpu")
NF4, FP4, INT4 = (Scheme(kind=kind) for kind in ("nf4", "fp4", "int4"))


def drawn(kind="nf4", shape=(130, 192), nested=True, block=64):
    if kind == "nf4":
        scheme = Scheme(kind="nf4", block_size=block, double_quant=nested)
        generator = torch.Generator().manual_seed(3)
        return quantize((0.05 * torch.randn(shape, generator=generator)).bfloat16(), scheme)
    return weight_of(Scheme(kind=kind, block_size=block), shape, Draw(CPU))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_products_are_those_of_the_dequantized_weight(kind, nested, dtype):
    weight = drawn(kind, nested=nested)
    dense = weight.dequantize(torch.float32)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for tokens in (1, 2, 17):
        x = Draw(CPU).normal(tokens, 192, dtype=dtype)
        with kernels.override("bitsandbytes"):
            out = kernels.linear(x, weight)
        oracle = x.float() @ dense.T
        assert out.dtype == dtype
        assert (out.float() - oracle).abs().max() <= bound * oracle.abs().max()


@needs_bitsandbytes
def test_it_is_the_package_that_multiplies(monkeypatch):
    weight, x = drawn(), torch.ones(2, 192)
    assert bnb.takes(weight)
    monkeypatch.setattr(bnb.package(), "matmul_4bit", lambda *_, **__: "the package's")
    with kernels.override("bitsandbytes"):
        assert kernels.linear(x, weight) == "the package's"


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (drawn(shape=(130, 96)), "a block belongs to two rows, where its results are wrong"),
        (drawn(block=32), "a block size that it has not"),
        (drawn("e2m1"), "another table"),
        (replace(drawn(), table=drawn().table * 1.01), "another table"),
        (replace(drawn("fp4"), high_first=False), "the nibbles in another order"),
        (int4(128, 128), "integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_torch_multiplies_what_it_does_not_take(weight, why):
    assert not bnb.takes(weight), why
    x = Draw(CPU).normal(3, weight.shape[1])
    oracle = x @ weight.dequantize(torch.float32).T
    with kernels.override("bitsandbytes"):
        out = kernels.linear(x, weight)
    assert (out - oracle).abs().max() <= 1e-5 * oracle.abs().max()


@needs_bitsandbytes
def test_its_products_have_gradients():
    weight = drawn()
    x = Draw(CPU).normal(3, 192).requires_grad_()
    with kernels.override("bitsandbytes"):
        kernels.linear(x, weight).sum().backward()
    wanted = weight.dequantize(torch.float32).sum(0)
    assert torch.allclose(x.grad, wanted.expand(3, -1), atol=5e-3)  # its weights are bfloat16


@needs_bitsandbytes
def test_experts_go_through_it(monkeypatch):
    experts = [Expert(*(drawn(shape=(64, 64)) for _ in range(3))) for _ in range(4)]
    draw = Draw(CPU)
    x, routes = draw.normal(1, 64), draw.routes(1, 4, 2)
    with kernels.override("reference"):
        oracle = kernels.experts(x, routes, experts, F.silu)
    monkeypatch.setattr(kernels, "matmul", None)
    with kernels.override("bitsandbytes"):
        out = kernels.experts(x, routes, experts, F.silu)
    assert torch.allclose(out, oracle, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_tried_on_small_matrices_first(dtype):
    assert bnb.why_not(CPU, dtype, (NF4, FP4, INT4)) is None


@needs_bitsandbytes
def test_wrong_results_are_a_reason(monkeypatch):
    bnb._failure.cache_clear()
    monkeypatch.setattr(trial, "BOUND", 0.0)
    said = str(bnb.why_not(CPU, torch.bfloat16, (NF4,)))
    bnb._failure.cache_clear()
    assert "wrong results: matmul of 1 tokens and nf4" in said


@needs_bitsandbytes
def test_a_failure_is_a_reason(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no kernel for this card\nand more")

    bnb._failure.cache_clear()
    monkeypatch.setattr(bnb.package(), "matmul_4bit", fails)
    said = str(bnb.why_not(CPU, torch.bfloat16, (NF4,)))
    bnb._failure.cache_clear()
    assert "RuntimeError: no kernel for this card" in said
    assert "more" not in said


def test_other_weights_are_a_reason():
    said = str(bnb.why_not(CPU, torch.bfloat16, (INT4,)))
    assert "NF4 or FP4" in said
    assert "int4 g128" in said
    assert "no quantized weights" in str(bnb.why_not(CPU, torch.bfloat16, ()))


def test_a_missing_package_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    bnb.package.cache_clear()
    bnb._failure.cache_clear()
    try:
        error = bnb.why_not(CPU, torch.bfloat16, (NF4,))
    finally:
        bnb.package.cache_clear()
        bnb._failure.cache_clear()
    assert isinstance(error, UnsupportedError)
    assert "pip install bitsandbytes" in str(error)


@needs_bitsandbytes
def test_descriptions_live_as_long_as_their_weights():
    before = len(bnb._states._made)
    weight = drawn()
    assert isinstance(weight, Table)
    assert bnb.takes(weight)
    assert len(bnb._states._made) == before + 1
    del weight
    assert len(bnb._states._made) == before
