"""The codes and inputs with the largest sums, on every instruction set, against float64."""

from dataclasses import replace

import pytest
import torch

from qmix import kernels
from qmix.kernels import Routes
from qmix.kernels.cpu import packed_moe
from qmix.kernels.cpu.library import library
from qmix.weights.affine import Affine
from qmix.weights.expert import Expert
from qmix.weights.packed.layout import pack_expert, unpack_expert
from qmix.weights.scales import NestedScales
from qmix.weights.table import VALUES, Table

N, K = 128, 512
CODES = {"ones": 0x11, "largest": 0xFF, "smallest": 0x00, "largest and smallest": 0xF0}


def nf4(code, block=64, kind="nf4", n=N, k=K):
    table = torch.tensor(VALUES[kind])
    codes = torch.full((n * k // 2,), code, dtype=torch.uint8)
    scales = torch.full((n * k // block,), 0.02)
    return Table(codes, scales, table, (n, k), torch.bfloat16, block, kind)


def int4(code, zero=None, group=128, n=N, k=K):
    scales = torch.full((n, k // group), 0.01, dtype=torch.float16)
    zeros = None if zero is None else torch.full((n, k // group), zero, dtype=torch.uint8)
    return Affine(torch.full((n, k // 2), code, dtype=torch.uint8), scales, zeros)


def int8(code, zero=None):
    scales = torch.full((N, 4), 0.01, dtype=torch.float16)
    zeros = None if zero is None else torch.full((N, 4), zero, dtype=torch.uint8)
    return Affine(torch.full((N, K), code, dtype=torch.uint8), scales, zeros, bits=8)


def shifted(code, bits, zeros=None, biases=None):
    """Groups of 16 with zeros, or biases, that are no integers."""
    scales = torch.full((N, K // 16), 0.01)
    codes = torch.full((N, K * bits // 8), code, dtype=torch.uint8)
    zeros, biases = (None if value is None else value + 0 * scales for value in (zeros, biases))
    return Affine(codes, scales, zeros, bits=bits, biases=biases)


def k_quant(code, bits):
    """Groups of 32 with nested scales and biases of six bits, all of them the largest."""
    six_bits = torch.full((N, K // 32 * 3 // 4), 0xFF, dtype=torch.uint8)
    outer = torch.full((N * K // 256,), 0.01 / 63, dtype=torch.float16)
    scales = NestedScales(six_bits, outer, torch.arange(64.0), block=8, bits=6)
    biases = replace(scales, map=-(2.0 ** (bits - 1)) * scales.map)
    codes = torch.full((N, K * bits // 8), code, dtype=torch.uint8)
    return Affine(codes, scales, bits=bits, biases=biases)


WEIGHTS = {
    "nf4": nf4,
    "nf4 of 128": lambda code: nf4(code, 128),
    "fp4": lambda code: nf4(code, kind="fp4"),
    "int4": int4,
    "int4 of 32": lambda code: int4(code, group=32),
    "int4, zeros of 0": lambda code: int4(code, 0),
    "int4, zeros of 15": lambda code: int4(code, 15),
    "int8": int8,
    "int8, zeros of 255": lambda code: int8(code, 255),
    "e2m1 of 16": lambda code: nf4(code, 16, "e2m1"),
    "iq4 of 32, low nibble first": lambda code: replace(nf4(code, 32, "iq4"), high_first=False),
    "int4 of 16, zeros of 7.5": lambda code: shifted(code, 4, zeros=7.5),
    "int4 of 16, biases": lambda code: shifted(code, 4, biases=-0.15),
    "int8 of 16, biases": lambda code: shifted(code, 8, biases=-2.55),
    "int8 of 16, zeros of 127.5": lambda code: shifted(code, 8, zeros=127.5),
    "int2 of 16, biases": lambda code: shifted(code, 2, biases=-0.03),
    "int3 of 16, zeros of 3.5": lambda code: shifted(code, 3, zeros=3.5),
    "int4 in k-quants": lambda code: k_quant(code, 4),
    "int5 in k-quants": lambda code: k_quant(code, 5),
    "int6 of 16": lambda code: shifted(code, 6),
    "int6 of 16, biases": lambda code: shifted(code, 6, biases=-0.6),
    "int8 in k-quants": lambda code: k_quant(code, 8),
}


def largest_value(kind):
    """The largest value that a code of it stands for."""
    weights = (WEIGHTS[kind](code) for code in CODES.values())
    return max(float(weight.dequantize(torch.float32).abs().max()) for weight in weights)


def inputs():
    """Rows [K]: all alike, all alike in turn, the largest of float16, an outlier, tiny ones."""
    row = torch.ones(K)
    alternating = row * (1 - 2 * (torch.arange(K) % 2))
    outlier = torch.full((K,), 0.01)
    outlier[77] = 1000.0
    return torch.stack([row, -row, alternating, 65504 * row, outlier, 1e-30 * row])


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_matmuls_are_those_of_float64(isa, kind, code):
    weight = WEIGHTS[kind](code)
    dense = weight.dequantize(torch.float32).double()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = inputs().to(dtype)
        for tokens in (x, x[:1], x[3:4], x[4:5], x.repeat(4, 1)):
            out = kernels.linear(tokens, weight).double()
            exact = tokens.double() @ dense.T
            # Inputs and tables are rounded to 2^-14 of the largest there is.
            largest = tokens.double().abs().amax(1, keepdim=True) * K * largest_value(kind)
            rounded = exact.abs() * torch.finfo(dtype).eps
            finite = exact.abs() < torch.finfo(dtype).max
            assert ((out - exact).abs() <= 1e-4 * largest + rounded)[finite].all()


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
@pytest.mark.parametrize(
    "weight",
    [nf4, lambda c, **at: nf4(c, 128, **at), int4, lambda c, **at: int4(c, 15, **at)],
    ids=["nf4", "nf4 of 128", "int4", "int4, zeros of 15"],
)
def test_packed_experts_are_those_of_float64(isa, weight, code):
    blob = pack_expert(
        Expert(
            w1=weight(code, n=256, k=K), w2=weight(code, n=K, k=256), w3=weight(code, n=256, k=K)
        )
    )
    unpacked = unpack_expert(blob)
    w1, w2, w3 = (
        matrix.dequantize(torch.float32).double()
        for matrix in (unpacked.w1, unpacked.w2, unpacked.w3)
    )
    for x in inputs()[:3]:
        x = x[None]
        hidden = torch.nn.functional.silu(x.double() @ w1.T) * (x.double() @ w3.T)
        exact = hidden @ w2.T
        cancelled = (hidden.abs() @ w2.abs().T).norm()
        out = packed_moe.experts(
            x, Routes(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)), [blob]
        )
        assert (out - exact).norm() <= 3e-4 * exact.norm() + 1e-6 * cancelled + 1e-9
    assert (library().fallbacks > 0) == (isa == "torch")


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4", "int4, zeros of 15"])
def test_tiny_inputs_are_kept_but_for_those_that_vnni_takes_for_zero(isa, kind):
    """docs/accuracy.md states these bounds."""
    weight = WEIGHTS[kind](0xF3)
    dense = weight.dequantize(torch.float32).double()
    in_float32 = 4e-6 if isa != "torch" else K * 2**-24  # torch may add one input after the other
    bounds = {torch.float32: in_float32, torch.bfloat16: 2**-8, torch.float16: 2**-10}
    for dtype, bound in bounds.items():
        for size in (1.0, 1e-30, 1.2e-34, 5e-35, 2e-37):
            if dtype == torch.float16:
                size = max(size, 6e-5)  # the least normal one: no output is rounded away
            x = size * torch.ones(2, K).to(dtype)
            out, exact = kernels.linear(x.to(dtype), weight).double(), x.double() @ dense.T
            few = isa not in ("torch", "portable") and dtype == torch.bfloat16 and size < 1e-30
            if few and size < 5.4e-35:
                assert not out.any()
            else:
                assert (out - exact).norm() <= (0.1 if few else bound) * exact.norm()
