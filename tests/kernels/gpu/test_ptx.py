"""What Triton compiles for our kernels, run by tests.support.ptx and compared in float64.

`make test` runs a few cases, `make soak` all of them, and with them the tests that Triton's own
interpreter runs.
"""

from dataclasses import replace

import pytest
import torch

from tests.support.interpreter import run_apart
from tests.support.soak import grid, one_in

pytest.importorskip("triton")

from qmix.evals.timing.machine_code import compiled
from qmix.evals.timing.plain_kernels import plain_kernels
from qmix.evals.timing.weight_kernels import FORMATS, weight_kernels
from tests.support.ptx import cases, mutations
from tests.support.ptx.device import Device, installed
from tests.support.ptx.machine import check_known
from tests.support.ptx.source import parse

pytestmark = pytest.mark.usefixtures("poison")

TOKENS = (1, 8, 16, 40)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check(case, *arguments, **options):
    """Run a case; the kernels that it launched."""
    with installed(Device()) as device:
        results = case(*arguments, **options)
    wrong = [
        f"{r.what}: {r.error():.1e}, at most {r.bound:.1e}" for r in results if not r.is_right()
    ]
    assert not wrong, wrong
    return {name for name, _, _ in device.launches}


@pytest.mark.parametrize(("weights", "tokens"), grid(27, cases.WEIGHTS, TOKENS))
def test_a_matmul(weights, tokens):
    assert check(cases.linear, weights, tokens) == {"packed_matmul", "combine"}


@pytest.mark.parametrize(("weights", "tokens"), grid(27, cases.WEIGHTS, TOKENS))
def test_experts(weights, tokens):
    assert check(cases.experts, weights, tokens) == {"gate_up", "down", "combine"}


@pytest.mark.parametrize(("weights", "dtype"), grid(15, cases.WEIGHTS, DTYPES), ids=str)
def test_dequantize(weights, dtype):
    assert check(cases.dequantize, weights, dtype) == {"dequantize"}


@pytest.mark.soak
@pytest.mark.parametrize("warps", [1, 2])
@pytest.mark.parametrize(("weights", "tokens"), grid(1, cases.WEIGHTS, TOKENS))
def test_smaller_thread_blocks(weights, tokens, warps):
    tuning = cases.moe.Tuning(warps=warps)
    check(cases.linear, weights, tokens, tuning=tuning)
    check(cases.experts, weights, tokens, tuning=tuning)


@pytest.mark.parametrize(("dtype", "tokens"), grid(12, DTYPES, TOKENS), ids=str)
def test_norms(dtype, tokens):
    assert check(cases.norms, dtype, tokens) == {"residual_norm"}


@pytest.mark.parametrize(("dtype", "tokens"), grid(12, DTYPES, TOKENS), ids=str)
def test_route(dtype, tokens):
    assert check(cases.route, dtype, tokens) == {"route"}


@pytest.mark.parametrize(("dtype", "tokens"), grid(12, DTYPES, TOKENS), ids=str)
def test_rotary(dtype, tokens):
    assert check(cases.rotary, dtype, tokens) == {"rotate", "rotate_store"}


FUSED = {"start_norm", "matmul_rotate_store", "matmul_add_route", "gate_up", "down_add"}


@pytest.mark.parametrize(
    ("weights", "dtype", "tokens"), grid(90, cases.WEIGHTS, DTYPES, (1, 8, 16)), ids=str
)
def test_a_layer_whose_products_do_what_lies_between(weights, dtype, tokens):
    assert check(cases.fused_layer, weights, dtype, tokens) == FUSED


@pytest.mark.parametrize(("dtype", "window"), grid(6, DTYPES, (None, 20)), ids=str)
def test_one_query(dtype, window):
    assert check(cases.attend, dtype, 1, window=window) == {"split", "merge"}


@pytest.mark.parametrize(("dtype", "window"), grid(6, DTYPES, (None, 20)), ids=str)
def test_the_last_split_merges(dtype, window):
    assert check(cases.attend, dtype, 1, window=window, arrivals=True) == {"split"}


@pytest.mark.parametrize(
    ("dtype", "queries", "window"), grid(12, DTYPES, (9, 40), (None, 20)), ids=str
)
def test_prefill(dtype, queries, window):
    assert check(cases.attend, dtype, queries, window=window) == {"prefill"}


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixtrals_heads(dtype):
    """32 heads on 8, 128 wide."""
    for queries in (1, 2, 40):
        check(cases.attend, dtype, queries, heads=(32, 8, 128))


def known(variants):
    """Every instruction of these kernels, compiled ahead of time, is known."""
    with installed(Device()):
        for variant in variants:
            check_known(parse(compiled(variant.source()).asm["ptx"]))


@pytest.mark.soak
@pytest.mark.parametrize("tile_format", FORMATS, ids=str)
def test_every_instruction_of_the_matmuls_is_known(tile_format):
    known(weight_kernels([80], [tile_format]))


@pytest.mark.soak
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_of_the_other_kernels_is_known(dtype):
    known(plain_kernels([80], [dtype]))


@pytest.mark.soak
@pytest.mark.parametrize("name", ["experts", "attention", "fused", "decoding", "store", "probe"])
@pytest.mark.parametrize("soak", [False, True])
def test_what_triton_interprets(name, soak):
    run_apart(name, interpreted=False, as_ptx=True, soak=soak)


@pytest.mark.parametrize("name", one_in(3, ["matmul nf4", "matmul int4", "matmul int3"]))
def test_mistakes_are_caught(name):
    """Those that are mistakes wherever they are made, at one place each."""
    campaign = mutations.CAMPAIGNS[name]
    sure = tuple(each for each in campaign.mutations if each.caught == mutations.ALL)
    found = dict(mutations.run(replace(campaign, mutations=sure), 1))
    assert len(found) >= 10
    assert not [each.name for each in found if mutations.missed(each, found[each])]


@pytest.mark.soak
@pytest.mark.parametrize("name", mutations.CAMPAIGNS)
def test_all_mistakes_are_caught(name):
    found = dict(mutations.run(mutations.CAMPAIGNS[name], 6))
    print(name, sum(len(outcomes) for outcomes in found.values()))
    assert not [each.name for each in found if mutations.missed(each, found[each])]
