"""Prompts on the matrix unit of AMX; skipped where there is none, or the system refuses it."""

import pytest
import torch

from qmix import kernels
from qmix.instruction_sets import VARIABLE
from qmix.kernels.cpu.library import library
from tests.support.cpu_kernels import (
    available,
    random_affine,
    random_int4,
    random_nf4,
    random_table,
    seeded,
)

WEIGHTS = {
    "nf4": lambda n, k: random_nf4(n, k, nested=True),
    "e2m1": lambda n, k: random_table(n, k),
    "int4": lambda n, k: random_int4(n, k, k // 32, zeros=True),
    "int3": lambda n, k: random_affine(n, k, 3, 64),
    "int6 of 16": lambda n, k: random_affine(n, k, 6, 16, "8 bits of 16"),
    "int8": lambda n, k: random_affine(n, k, 8, 64, biases=torch.float16),
}


@pytest.fixture
def amx(monkeypatch, two_threads):
    """The library for AMX; it is looked up before and after."""
    if "amx" not in available():
        pytest.skip("no AMX on this processor, the system refuses it, or no compiler")
    with monkeypatch.context() as patched:
        patched.setenv(VARIABLE, "amx")
        library.cache_clear()
        yield library()
    library.cache_clear()


def inputs(tokens, width, dtype=torch.bfloat16):
    return torch.randn(tokens, width, generator=seeded(tokens)).to(dtype)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_err_by_what_two_halves_leave_out(amx, kind, dtype):
    """Rows and inputs that fill no tile, panels of one and of two tiles of tokens."""
    for rows, width, tokens in ((50, 320, 96), (33, 576, 109), (130, 1088, 129)):
        weight, x = WEIGHTS[kind](rows, width), inputs(tokens, width, dtype)
        dense = weight.dequantize(torch.float32).double()
        exact = x.double() @ dense.T
        size = x.double().norm(dim=1, keepdim=True) * dense.norm(dim=1)
        rounding = (exact.to(dtype).double() - exact).abs()
        error = (kernels.linear(x, weight).double() - exact).abs()
        assert (error <= 2 * rounding + 2**-16 * size).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_token_of_a_prompt_does_not_depend_on_the_others(amx, kind):
    weight, x = WEIGHTS[kind](112, 320), inputs(600, 320)
    out = kernels.linear(x, weight)
    for first, last in ((0, 96), (5, 114), (500, 600)):
        assert torch.equal(kernels.linear(x[first:last], weight), out[first:last])
    x[20] = torch.nan
    poisoned = kernels.linear(x, weight)
    assert poisoned[20].isnan().all()
    poisoned[20] = out[20]
    assert torch.equal(poisoned, out)


def test_few_tokens_and_float32_are_those_of_vnni(amx, monkeypatch):
    weights = {kind: make(96, 256) for kind, make in WEIGHTS.items()}
    cases = [(kind, inputs(8, 256)) for kind in WEIGHTS]
    cases += [("nf4", inputs(95, 256)), ("int4", inputs(112, 256, torch.float32))]
    found = [kernels.linear(x, weights[kind]) for kind, x in cases]
    monkeypatch.setenv(VARIABLE, "vnni")
    library.cache_clear()
    for (kind, x), out in zip(cases, found, strict=True):
        assert torch.equal(kernels.linear(x, weights[kind]), out)
