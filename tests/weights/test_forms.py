"""The same weight in another form: the same float32 values, or a refusal that names the loss."""

import pytest
import torch

from qmix.weights import forms
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.forms import InexactError
from qmix.weights.scales import NestedScales


def affine(bits=4, group=32, **fields):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (8, 128), generator=generator, dtype=torch.uint8)
    scales = torch.rand(8, 128 // group, generator=generator).half() / 64
    return Affine(pack_codes(codes, bits), fields.pop("scales", scales), bits=bits, **fields)


def zeros(dtype=torch.uint8, group=32):
    return torch.arange(8 * 128 // group).remainder(16).view(8, -1).to(dtype)


def nested(values):
    """Scales in codes whose values are `values` [256]."""
    codes = torch.arange(32, dtype=torch.uint8).view(8, 4)
    return NestedScales(codes, torch.ones(1), values, block=32)


def same(one, other):
    return torch.equal(one.dequantize(torch.float32), other.dequantize(torch.float32))


def test_smaller_groups_repeat_scales():
    weight = affine(group=128, zeros=zeros(group=128))
    for size in (64, 32):
        smaller = forms.in_groups(weight, (size,))
        assert smaller.group_inputs == size
        assert same(weight, smaller)
    assert forms.in_groups(weight, (32, 128)) is weight
    with pytest.raises(InexactError, match="groups of 32 inputs"):
        forms.in_groups(affine(), (128, 64))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_wider_codes(bits):
    for weight in (affine(bits), affine(bits, biases=torch.rand(8, 4).half())):
        wider = forms.in_bits(weight, 8)
        assert wider.bits == 8
        assert same(weight, wider)
    with pytest.raises(InexactError, match="codes of 8 bits"):
        forms.in_bits(affine(8), 4)


def test_biases_that_are_codes_times_the_scale_become_zeros_and_back():
    scales = torch.full((8, 4), 0.125).half()
    weight = affine(scales=scales, zeros=zeros())
    biased = forms.with_biases(weight)
    assert biased.zeros is None
    assert same(weight, biased)
    again = forms.with_zeros(biased)
    assert torch.equal(again.zeros, zeros())
    assert same(weight, again)
    with pytest.raises(InexactError, match="free biases"):
        forms.with_zeros(affine(biases=torch.rand(8, 4).half()))
    assert forms.with_zeros(forms.with_biases(affine())).symmetric


def test_float_zeros_become_codes_only_if_they_are():
    weight = affine(zeros=zeros(torch.float16))
    assert forms.with_zeros(weight).zeros.dtype == torch.uint8
    assert same(weight, forms.with_zeros(weight))
    for wrong in (0.5, 16.0, -1.0):
        other = affine(zeros=torch.full((8, 4), wrong).half())
        with pytest.raises(InexactError, match="zeros that are no codes"):
            forms.with_zeros(other)


def test_nested_scales_become_plain_where_16_bits_hold_them():
    exact = affine(scales=nested(torch.arange(256) / 256))
    plain = forms.with_plain_scales(exact)
    assert plain.scales.dtype == torch.float16
    assert same(exact, plain)
    third = affine(scales=nested(torch.arange(256) / 3))
    with pytest.raises(InexactError, match="nested scales"):
        forms.with_plain_scales(third)
    rounded = forms.with_plain_scales(third, exact=False)
    expected = third.scales.floats(0, 32).half().view(8, 4)
    assert torch.equal(rounded.scales, expected)


def test_a_zero_times_its_scale_must_fit_the_scales_dtype():
    weight = affine(zeros=zeros() | 1)
    with pytest.raises(InexactError, match="zeros that float16 or bfloat16 does not hold"):
        forms.with_biases(weight)
    rounded = forms.with_biases(weight, exact=False)
    difference = rounded.dequantize(torch.float32) - weight.dequantize(torch.float32)
    assert 0 < difference.norm() / weight.dequantize(torch.float32).norm() < 1e-3


def test_an_order_of_inputs_is_undone_where_there_is_one_group():
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0)).int()
    one = affine(group=128, perm=order)
    assert forms.in_order(one).perm is None
    assert same(one, forms.in_order(one))
    with pytest.raises(InexactError, match="act-order"):
        forms.in_order(affine(perm=order))
