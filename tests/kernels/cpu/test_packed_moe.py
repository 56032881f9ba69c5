"""Experts in the packed layout on the CPU against what unpacking them gives."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from qmix.kernels import Routes
from qmix.kernels.cpu import packed_moe
from qmix.kernels.cpu.library import library
from qmix.weights.expert import Expert
from qmix.weights.packed.layout import pack_expert, unpack_expert
from tests.support.cpu_kernels import random_int4, random_nf4, seeded
from tests.support.packed import OTHERS, affine

D, WIDTH = 256, 384


def expert(kind, group=64, width=WIDTH):
    shapes = ((width, D), (D, width), (width, D))
    if kind.startswith(("int2", "int3")):
        return Expert(*(sliced(n, k, kind, group, seed) for seed, (n, k) in enumerate(shapes)))
    if kind == "nf4":
        return Expert(*(random_nf4(n, k, group) for n, k in shapes))
    zeros, perm = "zeros" in kind, "perm" in kind
    w1, w2, w3 = (random_int4(n, k, k // group, zeros=zeros, perm=perm) for n, k in shapes)
    return Expert(w1=w1, w2=w2, w3=w3)


def sliced(rows, inputs, kind, group, seed):
    """Codes in slices of bits, in a matrix of which neither plane is like the other."""
    weight = affine(rows, inputs, seed, bits=int(kind[3]), group=group, how="symmetric")
    if "zeros" not in kind:
        return weight
    zeros = torch.randint(0, 1 << weight.bits, weight.scales.shape, generator=seeded(seed))
    return replace(weight, zeros=zeros.to(torch.uint8))


def oracle(x, routes, experts):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for index, one in enumerate(experts):
        w1, w2, w3 = (
            weight.dequantize(torch.float32).double() for weight in (one.w1, one.w2, one.w3)
        )
        weight = (routes.weights * (routes.ids == index)).sum(-1, keepdim=True)
        hidden = torch.nn.functional.silu(x.double() @ w1.T) * (x.double() @ w3.T)
        out += weight * (hidden @ w2.T)
    return out


KINDS = ["nf4", "int4", "int4 zeros", "int4 perm zeros"]
SLICED = ["int2", "int2 zeros", "int3", "int3 zeros"]


@pytest.mark.parametrize(
    ("kind", "group"), [*product(KINDS, (64, 128)), *product(SLICED, (32, 64, 128))]
)
@pytest.mark.parametrize("tokens", [1, 2, 11])
def test_packed_experts_are_what_unpacking_gives(isa, kind, group, tokens):
    blobs = [pack_expert(expert(kind, group)) for _ in range(3)]
    assert blobs[0].gate_up.format.sliced == (kind in SLICED)
    ids = torch.stack([torch.randperm(3, generator=seeded(i))[:2] for i in range(tokens)])
    routes = Routes(ids, torch.tensor([[0.7, 0.3]]).expand(tokens, 2))
    x = torch.randn(tokens, D, generator=seeded())
    expected = oracle(x, routes, [unpack_expert(blob) for blob in blobs])
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16:
            x = x.to(dtype)
            expected = oracle(x, routes, [unpack_expert(blob) for blob in blobs])
        out = packed_moe.experts(x, routes, blobs)
        assert out.dtype == torch.float32
        assert (out - expected).norm() <= 3e-4 * expected.norm()
        assert torch.equal(out, packed_moe.experts(x, routes, blobs))
    assert (library().fallbacks > 0) == (isa == "torch")


COMPILED = {"own table": True, "fp4": True, "nf4 b256": True, "int2 biases": False}
COMPILED |= {"e2m1 b16": False, "int8 asymmetric": False, "int6 nested g16": False}
COMPILED |= {"int3 symmetric": True, "int2 g64": True, "int3 nested g16": False}
COMPILED |= {"int5 biases": False}


@pytest.mark.parametrize("kind", COMPILED)
def test_what_the_compiled_kernel_does_not_know_is_unpacked(kind):
    make = OTHERS[kind]
    stored = Expert(make(128, 256), make(256, 128, 1), make(128, 256, 2))
    packed = pack_expert(stored)
    assert packed_moe.is_compiled(packed) == (COMPILED[kind] and library().isa is not None)
    x = torch.randn(2, 256, generator=seeded())
    routes = Routes(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    expected = oracle(x, routes, [stored])
    assert (packed_moe.experts(x, routes, [packed]) - expected).norm() <= 2e-3 * expected.norm()


def test_threads_change_no_bit_and_only_chosen_experts_are_asked_for(isa):
    class Asked(list):
        def __getitem__(self, index):
            order.append(index)
            return super().__getitem__(index)

    order, before = [], torch.get_num_threads()
    blobs = Asked([pack_expert(expert("nf4", width=2176))] * 4)  # as many weights as take threads
    routes = Routes(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.5]]))
    x = torch.randn(1, D, generator=seeded())
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs.append(packed_moe.experts(x, routes, blobs))
    finally:
        torch.set_num_threads(before)
    assert order == [1, 3] * 3
    if isa != "torch":
        assert all(torch.equal(out, outs[0]) for out in outs)
