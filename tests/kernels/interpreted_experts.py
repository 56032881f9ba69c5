"""The packed kernels against `x @ w.dequantize().T`, in Triton's interpreter or on a GPU.

Run by test_triton_moe.py in a process of its own with TRITON_INTERPRET=1: the flag is read when
a kernel is defined. On a machine with a GPU: python -m pytest tests/kernels/interpreted_experts.py.
Fresh tensors are filled with NaN, so that what a kernel forgets to write shows.

Tolerances. Relative to one matmul, the kernels differ from the oracle by four roundings to
nearest: NF4's table in float16 (at most 1.82e-4), its scales in float16 (2^-11), activations in
float16 (2^-11; exact here, where they are drawn so), and between the two matmuls of an expert the
inner activations in float16 (2^-11). Each is independent from weight to weight, so the norm of the
error of a sum stays below the largest of them: eps = 1.82e-4 + 2^-11 = 6.7e-4 for an NF4 matmul.
An expert's gate and up projections and its down projection err by eps each, the rounding between by
2^-11: at most 3 eps + 2^-11 = 2.5e-3 for NF4, 2^-11 for Int4. Against the weight as it was packed
(`unpack`, and the table of the kernels) only the order of float32 additions remains: ORDER_BOUND.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.kernels import Routes
from qmix.kernels.gpu import moe as gpu
from qmix.kernels.gpu import packed_matmul
from qmix.kernels.gpu.grid import Tuning, grid_for, most_blocks
from qmix.nn.linear import Linear
from qmix.weights.dense import Dense
from qmix.weights.expert import Expert
from qmix.weights.packed.layout import pack_expert, pack_matrix
from qmix.weights.packed.table import ExpertTable
from qmix.weights.packed.weight import pack
from tests.support.interpreter import (
    CONVERSIONS,
    DEVICE,
    DTYPES,
    INTERPRETED,
    ROUNDING,
    drawn,
    error,
    skip_without_a_device,
)
from tests.support.models import small_model
from tests.support.packed import OTHERS, act_order, as_computed, int4, mixed_experts, nf4
from tests.support.soak import grid, one_in

skip_without_a_device()
NF4_BOUND, INT4_BOUND = 2.5e-3, 2**-11
ORDER_BOUND = 1e-5 if INTERPRETED else 1e-4  # a GPU's matrix units truncate while they add

FREE_BOUND = 1e-3  # scales, codes plus zeros that are none, and in groups of 16 their product

pytestmark = [CONVERSIONS, pytest.mark.usefixtures("poison")]

KINDS = {
    "nf4": (nf4, NF4_BOUND),
    "int4 g128": (lambda n, k, seed=0: int4(n, k, seed, group=128), INT4_BOUND),
    "int4 g64": (int4, INT4_BOUND),
    "int4 act-order": (act_order, INT4_BOUND),
    "int4 asymmetric": (lambda n, k, seed=0: int4(n, k, seed, symmetric=False), INT4_BOUND),
}


@pytest.mark.diagonal
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(128, 128), (384, 256), (128, 640)], ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 17, 33, 70])
def test_linear(kind, shape, tokens):
    make, bound = KINDS[kind]
    weight = make(*shape).to(DEVICE)
    packed = pack_matrix(weight)
    x = drawn(tokens, shape[1])
    out = gpu.linear(x, packed)
    assert out.dtype == x.dtype
    assert error(out, x @ weight.dequantize(torch.float32).T) <= bound
    assert error(out, x @ as_computed(packed).T) <= ORDER_BOUND
    assert torch.equal(out, gpu.linear(x, packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_in_other_shapes_and_dtypes(dtype):
    weight = nf4(128, 192).to(DEVICE)
    x = drawn(2, 3, 192, dtype=dtype)
    out = gpu.linear(x, pack_matrix(weight))
    assert out.shape == (2, 3, 128)
    assert out.dtype == dtype
    bound = max(NF4_BOUND, ROUNDING[dtype])
    assert error(out, x.float() @ weight.dequantize(torch.float32).T) <= bound


def in_float64(x, weight):
    return x.double() @ weight.dequantize(torch.float32).double().T


@pytest.mark.parametrize(("kind", "tokens"), grid(9, sorted(OTHERS), (1, 8, 16, 40)))
def test_every_other_kind(kind, tokens):
    """Other tables, groups of 16 and 32, biases, free zeros, nested scales, 2 to 8 bits."""
    weight = OTHERS[kind](128, 128).to(DEVICE)
    packed = pack_matrix(weight)
    x = drawn(tokens, 128)
    out = gpu.linear(x, packed)
    assert error(out, in_float64(x, weight)) <= FREE_BOUND
    assert error(out, x @ as_computed(packed).T) <= ORDER_BOUND
    found, meant = gpu.dequantize(replace(packed, perm=None), torch.float32), as_computed(packed)
    assert (found - meant).norm() <= FREE_BOUND * meant.norm()


@pytest.mark.parametrize("tokens", one_in(2, [3, 40]))
def test_a_matrix_whose_last_panel_is_part_full(tokens):
    weight = nf4(200, 128).to(DEVICE)
    x = drawn(tokens, 128)
    out = packed_matmul.linear(x, pack(weight))
    assert out.shape == (tokens, 200)
    assert error(out, in_float64(x, weight)) <= FREE_BOUND


@pytest.mark.parametrize(("kind", "tokens"), grid(22, sorted(OTHERS), (1, 8, 16, 40)))
def test_experts_of_every_other_kind(kind, tokens):
    experts, table = experts_of(OTHERS[kind], 4, 128, 128)
    x, chosen = drawn(tokens, 128), routes(tokens, 4, 2, "spread")
    assert error(gpu.experts(x, chosen, table, 0), oracle(x, chosen, experts)) <= 3 * FREE_BOUND


@pytest.mark.parametrize("shape", one_in(3, [(128, 4096), (128, 14336), (256, 4096)]), ids=str)
def test_linear_at_mixtrals_widths(shape):
    """A slice of a matrix as it is in the 8x7B: as many tiles, and K split, in few rows."""
    weight = nf4(*shape).to(DEVICE)
    packed = pack_matrix(weight)
    x = drawn(2, shape[1])
    out = gpu.linear(x, packed)
    assert error(out, x @ as_computed(packed).T) <= ORDER_BOUND


def routes(tokens, count, choices, how, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(count, generator=generator) for _ in range(tokens)])
    ids = ids[:, :choices].contiguous()
    if how == "all to one":
        ids[:] = torch.arange(choices) + 1
    elif how == "none to some":
        ids = ids % 2 * 3
    elif how == "the same twice":
        ids[:, 1] = ids[:, 0]
    weights = torch.rand(tokens, choices, generator=generator) + 0.1
    return Routes(ids.to(DEVICE), (weights / weights.sum(-1, keepdim=True)).to(DEVICE))


def experts_of(make, count, hidden, width):
    seeds = range(0, 10 * count, 10)
    experts = [
        Expert(make(width, hidden, s), make(hidden, width, s + 1), make(width, hidden, s + 2))
        for s in seeds
    ]
    experts = [Expert(e.w1.to(DEVICE), e.w2.to(DEVICE), e.w3.to(DEVICE)) for e in experts]
    return experts, ExpertTable.build([[pack_expert(e) for e in experts]])


def oracle(x, chosen, experts):
    with kernels.override("reference"):
        return kernels.experts(x, chosen, experts, F.silu)


@pytest.mark.diagonal
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 33])
def test_experts(kind, tokens):
    make, bound = KINDS[kind]
    experts, table = experts_of(make, 4, 128, 128)
    x, chosen = drawn(tokens, 128), routes(tokens, 4, 2, "spread")
    out = gpu.experts(x, chosen, table, 0)
    assert error(out, oracle(x, chosen, experts)) <= bound


@pytest.mark.diagonal
@pytest.mark.parametrize("how", ["spread", "all to one", "none to some", "the same twice"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 33, 40])
def test_experts_of_several_forms(how, tokens):
    """Each launch multiplies its own, and all leave their sums where one launch would."""
    experts = mixed_experts(128, 128, DEVICE)
    table = ExpertTable.build([[pack_expert(each) for each in experts]])
    assert (len(table.gate_up), len(table.down)) == (3, 2)
    x, chosen = drawn(tokens, 128), routes(tokens, 4, 2, how)
    tuning = Tuning(dense_tokens=33)
    out = gpu.experts(x, chosen, table, 0, tuning)
    assert error(out, oracle(x, chosen, experts)) <= NF4_BOUND
    assert torch.equal(out, gpu.experts(x, chosen, table, 0, tuning))


@pytest.mark.diagonal
@pytest.mark.parametrize("how", ["all to one", "none to some", "the same twice"])
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_routing(how, tokens):
    experts, table = experts_of(nf4, 4, 128, 64)
    x, chosen = drawn(tokens, 128), routes(tokens, 4, 2, how)
    out = gpu.experts(x, chosen, table, 0)
    assert error(out, oracle(x, chosen, experts)) <= NF4_BOUND
    assert torch.equal(out, gpu.experts(x, chosen, table, 0))


@pytest.mark.parametrize("tokens", one_in(2, [3, 40]))
def test_eight_experts_of_a_ragged_width(tokens):
    """K is no multiple of 128 on either side, w2's tiles are of another size than w1's."""

    def make(rows, columns, seed):
        return int4(rows, columns, seed, group=columns)

    experts, table = experts_of(make, 8, 256, 192)
    assert (table.gate_up[0].format.inputs, table.down[0].format.inputs) == (128, 64)
    x, chosen = drawn(tokens, 256), routes(tokens, 8, 2, "spread")
    assert error(gpu.experts(x, chosen, table, 0), oracle(x, chosen, experts)) <= INT4_BOUND


@pytest.mark.parametrize("warps", [1, 4])
def test_other_thread_blocks(warps):
    tuning = Tuning(warps=warps, stages=2)
    weight = int4(128, 256, group=128, symmetric=False).to(DEVICE)
    x = drawn(3, 256)
    out = gpu.linear(x, pack_matrix(weight), tuning)
    assert error(out, x @ weight.dequantize(torch.float32).T) <= ORDER_BOUND
    experts, table = experts_of(nf4, 2, 128, 64)
    x, chosen = drawn(2, 128), routes(2, 2, 2, "spread")
    assert error(gpu.experts(x, chosen, table, 0, tuning), oracle(x, chosen, experts)) <= NF4_BOUND


@pytest.mark.parametrize("kind", one_in(2, [nf4, act_order]))
def test_the_last_split_of_w1_and_w3_adds_all_of_them(kind):
    """To the same bits whenever it arrives, and its counters are zero again."""
    experts, table = experts_of(kind, 4, 512, 64)
    x, chosen = drawn(2, 512), routes(2, 4, 2, "none to some")
    arrivals = torch.zeros(4 * most_blocks(table.shape), dtype=torch.int32, device=DEVICE)
    many = Tuning(warps_per_sm=28)
    (form,) = table.gate_up
    grid = grid_for(table.shape, form.format, groups=4, columns=8, multiprocessors=2, tuning=many)
    assert grid.splits > 1

    def partials(arrivals):
        return gpu.expert_partials(x.half(), chosen, table, 0, many, arrivals=arrivals)

    parts = [partials(arrivals) for _ in range(2)]
    assert torch.equal(*parts)
    assert not arrivals.any()
    out, whole = (part.sum(0).view(2, 2, 512).sum(1) for part in (parts[0], partials(None)))
    assert error(out, oracle(x, chosen, experts)) <= NF4_BOUND
    assert error(out, whole) <= 1e-3  # inner activations are rounded to float16


@pytest.mark.parametrize("mixed", [False, True])
def test_where_an_expert_lies_changes_no_bit(mixed):
    """Also of several forms, whose w2 begin at places of their own."""
    _, table = experts_of(nf4, 4, 128, 64)
    if mixed:
        table = ExpertTable.build([list(map(pack_expert, mixed_experts(64, 128, DEVICE)))])
    x, chosen = drawn(2, 128), routes(2, 4, 2, "spread")
    before = gpu.experts(x, chosen, table, 0)
    for expert in range(4):
        moved = torch.cat((table.blobs[0][expert].new_zeros(128), table.blobs[0][expert]))[128:]
        table.blobs[0][expert].zero_()
        table.addresses[0, expert] = moved.data_ptr()
        table.blobs[0][expert] = moved
    assert torch.equal(gpu.experts(x, chosen, table, 0), before)


@pytest.mark.parametrize("scale", [0.05, 300.0])
def test_large_and_small_activations(scale):
    """Inner activations above 65504 do not fit float16 as they are; nor may small ones vanish."""
    experts, table = experts_of(nf4, 4, 128, 64)
    x, chosen = drawn(2, 128) * scale, routes(2, 4, 2, "spread")
    inner = [F.silu(kernels.linear(x, e.w1)) * kernels.linear(x, e.w3) for e in experts]
    assert (max(part.abs().max() for part in inner) > 65504) == (scale > 1)
    assert error(gpu.experts(x, chosen, table, 0), oracle(x, chosen, experts)) <= 2 * NF4_BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_dequantize(kind):
    make, _ = KINDS[kind]
    for shape in ((128, 128), (256, 384)):
        packed = replace(pack_matrix(make(*shape).to(DEVICE)), perm=None)  # inputs as packed
        found, meant = gpu.dequantize(packed, torch.float32), as_computed(packed)
        assert (found - meant).abs().max() <= 1e-6 * meant.abs().max()


@pytest.mark.diagonal
@pytest.mark.parametrize("kind", [nf4, act_order])
@pytest.mark.parametrize("how", ["spread", "all to one", "the same twice"])
def test_above_the_crossover_experts_are_dequantized(how, kind):
    tuning = Tuning(dense_tokens=4)
    experts, table = experts_of(kind, 4, 128, 64)
    x, chosen = drawn(6, 128), routes(6, 4, 2, how)
    assert error(gpu.experts(x, chosen, table, 0, tuning), oracle(x, chosen, experts)) <= NF4_BOUND
    weight = kind(128, 192).to(DEVICE)
    x = drawn(6, 192)
    out = gpu.linear(x, pack_matrix(weight), tuning)
    assert error(out, x @ weight.dequantize(torch.float32).T) <= NF4_BOUND


@pytest.mark.parametrize("kind", one_in(2, [nf4, int4]))
def test_a_model_says_the_same_tokens(kind, monkeypatch):
    """Every expert and projection through the packed kernels: the oracle's greedy tokens."""
    model = small_model(
        hidden_size=128, intermediate_size=64, num_local_experts=4, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    ).to(DEVICE)  # fmt: skip
    packed, tables = {}, {}
    for seed, module in enumerate(m for m in model.modules() if isinstance(m, Linear)):
        if module.out_features % 64 == 0 and module.in_features % 64 == 0:
            module.store(kind(module.out_features, module.in_features, seed).to(DEVICE))
    prompt = torch.tensor([[3, 17, 90, 41, 8]], device=DEVICE)

    def greedy():
        tokens, logits = prompt, []
        for _ in range(3):
            logits.append(model(input_ids=tokens).logits[:, -1].float())
            tokens = torch.cat((tokens, logits[-1].argmax(-1, keepdim=True)), 1)
        return tokens, torch.cat(logits)

    def linear(x, weight):
        if isinstance(weight, Dense):
            return plain(x, weight)
        if id(weight) not in packed:
            packed[id(weight)] = pack_matrix(weight)
        return gpu.linear(x, packed[id(weight)])

    def experts(x, chosen, weights, act):
        key = id(weights[0].w1)
        if key not in tables:
            tables[key] = ExpertTable.build([[pack_expert(e) for e in weights]])
        return gpu.experts(x, chosen, tables[key], 0)

    plain = kernels.linear
    with torch.no_grad():
        with kernels.override("reference"):
            expected, expected_logits = greedy()
        monkeypatch.setattr(kernels, "linear", linear)
        monkeypatch.setattr(kernels, "linears", lambda x, each: [linear(x, w) for w in each])
        monkeypatch.setattr(kernels, "experts", experts)
        found, logits = greedy()
    assert len(tables) == 1
    assert len(packed) == 4 + 1  # projections and lm_head
    assert torch.equal(found, expected)
    assert error(logits, expected_logits) <= 2 * NF4_BOUND
