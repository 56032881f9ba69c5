"""Int4 and Int8: what their bits mean, however they are reached."""

from dataclasses import replace

import pytest
import torch

from qmix import kernels
from qmix.kernels import tiles
from qmix.weights.affine import Affine, pack_codes, reorder_codes, unpack_codes
from qmix.weights.dense import Weight
from qmix.weights.scheme import DENSE, NF4, Scheme
from qmix.weights.slabs import TILE_ELEMENTS

SHAPES = [(8, 32), (40, 128), (7, 256), (1, 4096)]
KINDS = pytest.mark.parametrize("bits", [4, 8], ids=["Int4", "Int8"])


def drawn(
    rows,
    columns,
    group,
    *,
    bits=4,
    symmetric=True,
    act_order=False,
    dtype=torch.float16,
    seed=0,
):
    """A random weight and, computed in plain float32, what it must mean."""
    count, half = 1 << bits, 1 << bits - 1
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group
    codes = torch.randint(0, count, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) / 10 + 0.001).to(dtype)
    zeros = torch.randint(0, count, (rows, groups), dtype=torch.uint8, generator=generator)
    if symmetric:
        zeros = torch.full_like(zeros, half)
    order = torch.randperm(columns, generator=generator) if act_order else torch.arange(columns)
    group_of = torch.arange(columns) // group
    meant = torch.empty(rows, columns)
    meant[:, order] = (codes.float() - zeros.float()[:, group_of]) * scales.float()[:, group_of]
    weight = Affine(
        codes=pack_codes(codes, bits),
        scales=scales,
        zeros=None if symmetric else zeros,
        perm=order.int() if act_order else None,
        bits=bits,
    )
    return weight, meant


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@KINDS
def test_dequantize_is_code_less_zero_times_scale(bits, shape, group, symmetric, act_order):
    rows, columns = shape
    group = columns if group == -1 else group
    if columns % group:
        return
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight, meant = drawn(rows, columns, group, bits=bits, symmetric=symmetric, act_order=act_order, dtype=dtype)  # fmt: skip
        assert isinstance(weight, Weight)
        assert weight.shape == shape
        assert weight.dtype == dtype
        assert weight.group_inputs == group
        assert torch.equal(weight.dequantize(torch.float32), meant)
        assert torch.equal(weight.dequantize(), meant.to(dtype))
        assert torch.equal(weight.dequantize(torch.bfloat16), meant.bfloat16())
        # The path for other devices means the same.
        plain = replace(weight, perm=None)
        assert torch.equal(plain._decode(0, rows, torch.float32), plain.dequantize(torch.float32))
        assert torch.equal(plain._decode(0, rows, torch.bfloat16), plain.dequantize(torch.bfloat16))


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@KINDS
def test_rows_are_slices_of_dequantize(bits, act_order):
    weight, meant = drawn(13, 64, 32, bits=bits, symmetric=False, act_order=act_order)
    for start in range(13):
        for stop in range(start + 1, 14):
            assert torch.equal(weight.rows(start, stop, torch.float32), meant[start:stop])


@KINDS
def test_tiles_and_threads_change_nothing(bits):
    columns = 4096
    rows = 5 * 8 * TILE_ELEMENTS // columns + 3  # more than four slabs, the last one short
    weight, meant = drawn(rows, columns, 128, bits=bits, symmetric=False)
    assert torch.equal(weight.dequantize(torch.float32), meant)
    assert torch.equal(weight.dequantize(), meant.half())
    with torch.inference_mode():
        assert torch.equal(weight.dequantize(), meant.half())


def test_a_byte_holds_two_inputs_the_first_one_low():
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    assert pack_codes(codes).tolist() == [[0x21, 0xF3]]
    weight = Affine(pack_codes(codes), torch.tensor([[0.5]]))
    assert weight.dequantize().tolist() == [[-3.5, -3.0, -2.5, 3.5]]
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_codes(unpack_codes(every)), every)


def test_a_code_of_8_bits_is_a_byte():
    codes = torch.tensor([[0, 1, 128, 255]], dtype=torch.uint8)
    assert pack_codes(codes, 8).tolist() == codes.tolist()
    scales = torch.tensor([[0.5]])
    assert Affine(codes, scales, bits=8).dequantize().tolist() == [[-64.0, -63.5, 0.0, 63.5]]
    zeros = torch.tensor([[255]], dtype=torch.uint8)
    values = Affine(codes, scales, zeros, bits=8).dequantize()
    assert values.tolist() == [[-127.5, -127.0, -63.5, 0.0]]


def test_codes_of_5_and_6_bits_are_their_lower_four_and_then_the_upper_ones():
    codes = torch.tensor([[1, 16, 2, 17, 31, 0, 0, 16]], dtype=torch.uint8)
    lower = [0x01, 0x12, 0x0F, 0x00]
    assert pack_codes(codes, 5).tolist() == [[*lower, 0b10011010]]
    assert pack_codes(codes + 32, 6).tolist() == [[*lower, 0b11101110, 0b11101011]]
    for bits in (5, 6):
        every = torch.arange(1 << bits, dtype=torch.uint8).view(2, -1)
        assert torch.equal(unpack_codes(pack_codes(every, bits), bits), every)


def test_reordering_moves_whole_codes():
    for rows, columns in ((3, 64), (64, 128), (130, 32)):
        generator = torch.Generator().manual_seed(rows)
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
        order = torch.randperm(columns, generator=generator)
        moved = reorder_codes(pack_codes(codes), order.int())
        assert torch.equal(unpack_codes(moved), codes[:, order])
        assert torch.equal(reorder_codes(moved, torch.argsort(order)), pack_codes(codes))
        for bits in (8, 6, 5, 3, 2):
            codes = torch.randint(0, 1 << bits, codes.shape, generator=generator).byte()
            packed = pack_codes(codes, bits)
            moved = unpack_codes(reorder_codes(packed, order.int(), bits), bits)
            assert torch.equal(moved, codes[:, order])


def test_extreme_scales_are_kept():
    codes = pack_codes(torch.tensor([[0, 15] * 16, [8, 9] * 16], dtype=torch.uint8))
    scales = torch.tensor([[65504.0], [6e-8]], dtype=torch.float16)
    values = Affine(codes, scales).dequantize(torch.float32)
    assert values[0, :2].tolist() == [-8 * 65504.0, 7 * 65504.0]
    assert values[1, :2].tolist() == [0.0, 2**-24]
    assert Affine(codes, scales).dequantize()[0, 0] == -torch.inf  # no clamp hides an overflow
    assert Affine(codes, -scales).dequantize(torch.float32)[0, 0] == 8 * 65504.0
    assert not Affine(codes, 0 * scales).dequantize().any()


def test_the_scheme_and_the_bytes():
    weight, _ = drawn(16, 256, 64)
    assert weight.scheme == Scheme(kind="int4", group_size=64)
    assert str(weight.scheme) == "int4 g64"
    assert weight.nbytes == 16 * 128 + 16 * 4 * 2
    assert weight.scheme.bits_per_weight == 8 * weight.nbytes / (16 * 256) == 4.25
    weight, _ = drawn(16, 256, 256, symmetric=False)
    assert weight.scheme == Scheme(kind="int4", group_size=-1, symmetric=False)
    assert str(weight.scheme) == "int4 per output asymmetric"
    assert weight.scheme.bits_per_weight == 4
    assert Scheme(kind="int4").bits_per_weight == 4.125
    assert Scheme(kind="int4", symmetric=False).bits_per_weight == 4.15625
    weight, _ = drawn(16, 256, 64, bits=8)
    assert weight.scheme == Scheme(kind="int8", group_size=64)
    assert weight.nbytes == 16 * 256 + 16 * 4 * 2
    assert weight.scheme.bits_per_weight == 8 * weight.nbytes / (16 * 256) == 8.25
    assert str(Scheme(kind="int8")) == "int8 g128"
    assert Scheme(kind="int8").bits_per_weight == 8 + 16 / 128
    assert Scheme(kind="int8", symmetric=False).bits_per_weight == 8 + 24 / 128
    assert Scheme(kind="int8", group_size=-1).bits_per_weight == 8
    assert str(Scheme(kind="int8", group_size=-1, symmetric=False)) == "int8 per output asymmetric"
    # The names that were there before are untouched.
    assert (str(NF4), str(DENSE)) == ("nf4 b64 double-quant", "16-bit")
    assert Scheme(kind="nf4", block_size=128).bits_per_weight == 4 + 8.125 / 128


@KINDS
def test_moving_keeps_everything(bits):
    weight, meant = drawn(8, 64, 32, bits=bits, symmetric=False, act_order=True)
    moved = weight.to(torch.device("cpu"))
    assert (type(moved), moved.bits) == (Affine, bits)
    assert torch.equal(moved.dequantize(torch.float32), meant)
    assert weight.to(torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("batch", [1, 2, 17])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@KINDS
def test_linear_matches_the_oracle(bits, batch, symmetric, act_order, dtype, bound):
    weight, meant = drawn(300, 2048, 128, bits=bits, symmetric=symmetric, act_order=act_order)
    x = torch.randn(3, batch, 2048, generator=torch.Generator().manual_seed(1)).to(dtype)
    oracle = x.float() @ meant.T
    for out in (kernels.linear(x, weight), _reference(x, weight)):
        assert out.dtype == dtype
        assert out.shape == (3, batch, 300)
        assert (out.float() - oracle).abs().max() <= bound * oracle.abs().max()


def _reference(x, weight):
    with kernels.override("reference"):
        return kernels.linear(x, weight)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@KINDS
def test_without_a_compiler_a_product_never_holds_more_than_one_tile(monkeypatch, bits, act_order):
    weight, _ = drawn(1000, 1024, 128, bits=bits, act_order=act_order)
    seen = []
    original = Affine.rows

    def rows(self, start, stop, dtype=None):
        seen.append((stop - start) * self.shape[1])
        return original(self, start, stop, dtype)

    monkeypatch.setattr(Affine, "rows", rows)
    tiles.linear(torch.ones(4, 1024), weight)
    assert sum(seen) == 1000 * 1024
    assert max(seen) <= tiles.AFFINE_TILE_ELEMENTS


def test_scales_and_zeros_may_have_any_strides():
    weight, meant = drawn(8, 128, 32, symmetric=False)
    wide = replace(
        weight,
        scales=weight.scales.repeat_interleave(2, 1)[:, ::2],
        zeros=weight.zeros.T.contiguous().T,
    )
    assert not wide.scales.is_contiguous()
    assert torch.equal(wide.dequantize(torch.float32), meant)
    assert torch.equal(wide.take(torch.tensor([5, 2])).dequantize(torch.float32), meant[[5, 2]])
