"""Keys and values as rows of codes: how near, alike in C++ and torch, and attention."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix import kernels
from qmix.errors import UsageError
from qmix.kernels import attention, kv_rows
from qmix.kernels.attention_mask import AttentionMask
from qmix.kernels.cpu.library import library
from qmix.kv_format import check_width, named, row_bytes
from tests.support.cpu_kernels import seeded


def spread(*shape):
    """Numbers of very different sizes from row to row, and a channel far above the others."""
    x = torch.randn(shape, generator=seeded(0)) * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., 1] *= 20
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_number_is_half_a_step_from_its_code_at_most(dtype):
    x = spread(2, 3, 7, 32).to(dtype)
    rows = kv_rows.quantized(x)
    assert rows.shape == (2, 3, 7, 36)
    assert rows.dtype == torch.int8
    error = (kv_rows.dequantized(rows, torch.float32) - x.float()).abs().amax(-1)
    assert (error <= x.float().abs().amax(-1) / 254 * 1.0001).all()
    assert row_bytes("int8", 32, 2) == rows.shape[-1]
    assert row_bytes("16", 32, 2) == 64


@given(bits=st.lists(st.integers(0, 65535), min_size=8, max_size=8), width=st.sampled_from([4, 8]))
def test_compiled_and_plain_codes_are_the_same_for_any_bits(bits, width):
    """Zeros, subnormals, infinities and NaN among them."""
    x = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, width)
    rows = kv_rows.quantized(x)
    found, plain = (
        kv_rows.dequantized(each, torch.float32) for each in (rows, kv_rows.quantized(x.float()))
    )
    assert torch.equal(found.nan_to_num(nan=1e38), plain.nan_to_num(nan=1e38))
    whole = x.float().isfinite().all(-1)
    assert found[whole].isfinite().all()
    assert found[~whole].isnan().all()


def test_zeros_stay_zeros():
    assert not kv_rows.dequantized(kv_rows.quantized(torch.zeros(1, 1, 2, 8)), torch.float32).any()


@pytest.mark.parametrize("width", [128, 36, 20, 4])
@pytest.mark.parametrize(("batch", "heads", "groups", "keys"), [(2, 8, 2, 300), (1, 3, 1, 1)])
def test_attention_of_one_token_reads_codes(isa, batch, heads, groups, keys, width):
    if isa == "torch":
        pytest.skip("there is no compiled attention")
    generator = seeded(0)
    q = torch.randn(batch, heads, 1, width, generator=generator).bfloat16()
    k, v = (
        kv_rows.quantized(
            torch.randn(batch, groups, keys + 9, width, generator=generator).bfloat16()
        )
        for _ in range(2)
    )
    k, v = k[:, :, 9:], v[:, :, 9:]  # as a ring or a window leaves them
    numbers = (kv_rows.dequantized(each, torch.float32) for each in (k, v))
    seen = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    expected = attention.reference(q.float(), *numbers, seen)
    found = library().attend(q, k, v)
    assert (found.float() - expected).abs().max() < 0.01
    assert torch.equal(kernels.attend(q, k, v), found)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", ["causal", "window", "padding", "heads", "floats"])
@pytest.mark.parametrize("at_once", [1 << 22, 1])
def test_a_few_heads_at_a_time_are_all_heads(implementation, mask, at_once, monkeypatch):
    monkeypatch.setattr(attention, "_NUMBERS", at_once)
    q = torch.randn(2, 8, 5, 16, generator=seeded(1))
    k, v = (torch.randn(2, 4, 12, 16, generator=seeded(seed)) for seed in (2, 3))
    seen = torch.rand(2, 8, 5, 12, generator=seeded(4)) > 0.3
    seen[..., 0] = True
    masks = {
        "causal": AttentionMask(),
        "window": AttentionMask(window=4),
        "padding": AttentionMask(padding_mask=torch.arange(12) >= torch.tensor([[0], [3]])),
        "heads": AttentionMask(attn_mask=seen),
        "floats": AttentionMask(attn_mask=torch.where(seen, 0.5, float("-inf"))[:, :1]),
    }
    rows = [kv_rows.quantized(each) for each in (k, v)]
    numbers = [kv_rows.dequantized(each, torch.float32) for each in rows]
    found = kernels.attend(q, *rows, masks[mask], implementation=implementation)
    expected = kernels.attend(q, *numbers, masks[mask], implementation=implementation)
    assert torch.allclose(found, expected, atol=1e-5)


def test_other_names_and_widths_are_refused():
    assert named(None) == named("16") == "16"
    for name in (16, "int4", "", ["int8"], True):
        with pytest.raises(UsageError, match="'16' or 'int8'"):
            named(name)
    check_width("16", 6)
    with pytest.raises(UsageError, match="multiple of 4"):
        check_width("int8", 6)
