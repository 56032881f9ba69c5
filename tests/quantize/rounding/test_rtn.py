"""Round to nearest and its scales: against plain Python, and through the file."""

import math

import pytest
import torch

from qmix.errors import CheckpointError
from qmix.formats.layouts import gptq
from qmix.formats.layouts.gptq_config import GPTQConfig
from qmix.quantize.rounding import rtn
from qmix.quantize.rounding.grid import float16_scale, search_grid
from qmix.weights.affine import unpack_codes
from qmix.weights.scheme import Scheme

N, K = 24, 256


def weight_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * 0.05
    weight[3, 40:60] *= 20
    weight[5] = weight[5].abs()
    weight[6] = -weight[6].abs()
    weight[7, :128] = 0
    weight[8] = 0
    weight[9] *= 1e-7  # scales that are float16 subnormals
    return weight.to(dtype)


def half(value):
    rounded = float(torch.tensor(value, dtype=torch.float32).half())
    return rounded or math.copysign(2.0**-24, value if value else 1.0)


def plain(group, bits, symmetric):
    """(codes of the file, scale, zero) of a list of floats."""
    last = (1 << bits) - 1
    if symmetric:
        zero = 1 << bits - 1
        extreme = max(group, key=lambda value: (abs(value), value))
        scale = half(extreme * 2 / last)
    else:
        low, high = min(0.0, *group), max(0.0, *group)
        scale = half((high - low) / last)
        zero = min(last, max(1, round(-low / scale)))
    return [min(last, max(0, round(value / scale) + zero)) for value in group], scale, zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("size", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_codes_are_those_of_plain_python(bits, size, symmetric, dtype):
    weight = weight_of(dtype)
    scheme = Scheme(kind="int4" if bits == 4 else "int8", group_size=size, symmetric=symmetric)
    found = rtn.quantize(weight, scheme)
    assert found.scheme == scheme
    assert found.scales.dtype == torch.float16
    codes = unpack_codes(found.codes) if bits == 4 else found.codes
    step, different = K if size == -1 else size, 0
    for n, row in enumerate(weight.float().tolist()):
        for group, start in enumerate(range(0, K, step)):
            expected, scale, zero = plain(row[start : start + step], bits, symmetric)
            assert float(found.scales[n, group]) == pytest.approx(scale, rel=1e-3, abs=2**-24)
            if symmetric:
                assert found.zeros is None
            else:
                assert int(found.zeros[n, group]) == zero
            different += sum(
                a != b
                for a, b in zip(codes[n, start : start + step].tolist(), expected, strict=True)
            )
    assert different <= 4  # quotients that float32 and float64 see on two sides of a half


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nothing_is_further_off_than_its_step_and_zeros_stay(symmetric, search):
    weight = weight_of()
    found = rtn.quantize(
        weight, Scheme(kind="int4", group_size=32, symmetric=symmetric), search=search
    )
    values = found.dequantize(torch.float32)
    assert not values[8].any()
    assert not values[7, :128].any()
    steps = found.scales.float().abs().repeat_interleave(32, 1)
    if not search:  # the search clips
        off = (values - weight).abs() / steps
        assert float(off[[0, 1, 2, 3, 4, 9]].max()) < 0.51
        # Where all have one sign a v1 file has no zero at the end of the codes.
        assert float(off[5:7].max()) < (0.51 if symmetric else 1.51)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_the_search_lowers_the_squared_error(kind, symmetric):
    weight = weight_of()[:3]
    scheme = Scheme(kind=kind, group_size=64, symmetric=symmetric)
    plainly, searched = (rtn.quantize(weight, scheme, search=on) for on in (False, True))
    errors = [
        float((one.dequantize(torch.float32) - weight).square().sum())
        for one in (plainly, searched)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("size", [-1, 32])
def test_the_file_holds_the_same_codes(kind, size, symmetric):
    found = rtn.quantize(weight_of(), Scheme(kind=kind, group_size=size, symmetric=symmetric))
    bits = 4 if kind == "int4" else 8
    said = GPTQConfig(bits=bits, symmetric=symmetric, group_size=size).for_module("w")
    again = gptq.unpack(gptq.pack(found, "w"), "w", "a file", (N, K), said)
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.scales, found.scales)
    assert again.perm is None
    if not symmetric:
        assert torch.equal(again.zeros, found.zeros)


def test_slabs_change_nothing(monkeypatch):
    scheme = Scheme(kind="int4", group_size=32, symmetric=False)
    whole = rtn.quantize(weight_of(), scheme)
    monkeypatch.setattr(rtn, "_SLAB_ELEMENTS", 5 * K)
    slabs = rtn.quantize(weight_of(), scheme)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(slabs, name), getattr(whole, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named(bad):
    weight = weight_of()
    weight[20, 30] = bad
    with pytest.raises(CheckpointError, match=r"^f: w: NaN or infinity in the weight"):
        rtn.quantize(weight, Scheme(kind="int4"), where="f: w")


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_float16_scales_cannot_hold_is_named(symmetric, search):
    weight = weight_of()
    weight[20, 30] = 1e7
    with pytest.raises(CheckpointError, match=r"^f: w: weights too large.*scales below 65504"):
        rtn.quantize(weight, Scheme(kind="int4", symmetric=symmetric), search=search, where="f: w")


def test_a_scale_is_never_zero_and_keeps_its_sign():
    found = float16_scale(torch.tensor([0.0, 1e-30, -1e-30, 2**-24, 1.0, 1 + 2**-12]))
    assert found.tolist() == [2**-24, 2**-24, -(2**-24), 2**-24, 1, 1]


def test_a_group_whose_longer_side_is_positive_is_turned_round():
    steps = torch.arange(-7, 9).repeat(2) * 0.01  # one more code above 0 than below
    importance = torch.ones(32, 1)
    for sign in (1, -1):
        grid = search_grid(sign * steps[:, None], importance, Scheme(kind="int4", group_size=32))
        assert float(grid.scale) * sign == pytest.approx(-0.01, rel=0.02)
        wide = grid.with_input_axis()
        values = wide.nearest(sign * steps[:, None]) * wide.scale
        assert float((values[:, 0] - sign * steps).abs().max()) < 0.002


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_spares_what_is_important(symmetric):
    generator = torch.Generator().manual_seed(0)
    group = torch.randn(64, 40, generator=generator)
    scheme = Scheme(kind="int4", group_size=64, symmetric=symmetric)
    importance = torch.ones(64, 1)
    importance[:8] = 1000

    def error(weights):
        wide = search_grid(group, weights, scheme).with_input_axis()
        return float(((wide.nearest(group) * wide.scale - group)[:8]).square().sum())

    assert error(importance) < 0.7 * error(torch.ones(64, 1))
