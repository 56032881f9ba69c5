"""Every attn_implementation against plain softmax attention, and what is refused by name."""

import importlib.util
import math
import sys

import pytest
import torch

from qmix import kernels
from qmix.errors import UnsupportedError, UsageError
from qmix.kernels import attention, flash
from qmix.kernels.attention import (
    attend_with,
    attention_with_weights,
    reference,
)
from qmix.kernels.attention_mask import AttentionMask, visible
from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.flash import flash_attn
from tests.support.models import TINY, ids, small_model


def tensors(queries, keys, heads=8, shared=2, width=16, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = (
        (batch, heads, queries, width),
        (batch, shared, keys, width),
        (batch, shared, keys, width),
    )
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.fixture
def fake_flash(monkeypatch):
    """flash-attn needs a GPU; a stand-in computes what it documents."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn())
    monkeypatch.setattr(flash, "check", lambda q: None)
    monkeypatch.setattr(flash, "check_installed", lambda: None)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("shared", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 12), (12, 12), (5, 12)])
def test_every_implementation_is_plain_softmax_attention(
    fake_flash, name, shared, window, queries, keys
):
    q, k, v = tensors(queries, keys, shared=shared)
    padded = torch.ones(2, keys, dtype=torch.bool)
    padded[1, : keys // 3] = False
    for padding_mask in (None, padded):
        expected = reference(q, k, v, visible(queries, keys, window, padding_mask))
        found = attend_with(name, q, k, v, AttentionMask(window, padding_mask))
        assert (found - expected).abs().max() < 1e-5
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_query_sees_exactly_window_keys_itself_included(window):
    q, k, v = tensors(12, 12)
    _, weights = attention_with_weights(q, k, v, AttentionMask(window=window))
    assert torch.equal((weights > 0).sum(-1)[0, 0], torch.arange(1, 13).clamp_max(window))


def test_a_mask_of_pairs_replaces_the_window_in_every_implementation():
    q, k, v = tensors(4, 9)
    seen = torch.rand(2, 1, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[0, 0, 1] = False
    added = torch.zeros(2, 1, 4, 9).masked_fill(~seen, -math.inf)
    expected = reference(q, k, v, seen)
    for name in ("eager", "sdpa"):
        for mask in (seen, added, torch.finfo(torch.float32).min * (~seen).float()):
            found = attend_with(name, q, k, v, AttentionMask(2, attn_mask=mask))
            assert (found - expected).abs().max() < 1e-5
    bias = torch.randn(1, 8, 4, 9, generator=torch.Generator().manual_seed(1))
    one = attend_with("eager", q, k, v, AttentionMask(attn_mask=bias))
    other = attend_with("sdpa", q, k, v, AttentionMask(attn_mask=bias))
    assert (one - other).abs().max() < 1e-5


def test_half_precisions_soften_in_float32():
    q, k, v = tensors(16, 16, dtype=torch.float16)
    expected = reference(q.float() * 40, k.float(), v.float(), visible(16, 16, None, None))
    for name in ("eager", "sdpa"):
        found = attend_with(name, q * 40, k, v)
        assert found.dtype == torch.float16
        assert (found - expected).abs().max() < 5e-2


def test_dropout_zeroes_weights_in_training_only():
    q, k, v = tensors(8, 8)
    for name in ("eager", "sdpa"):
        plain = attend_with(name, q, k, v)
        torch.manual_seed(0)
        dropped = attend_with(name, q, k, v, dropout=0.5)
        assert (plain - dropped).abs().max() > 1e-2
    model = small_model(attention_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(ids(9)).logits, model(ids(9)).logits)
        model.train()
        assert not torch.equal(model(ids(9)).logits, model(ids(9)).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("window", [None, 8])
def test_models_agree_whatever_their_attention(fake_flash, name, window):
    model = small_model(sliding_window=window)
    tokens = ids(30, batch=2)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = model(tokens, attention_mask=mask, position_ids=places).logits
    generated = model.generate(tokens, attention_mask=mask, max_new_tokens=12)
    model.set_attn_implementation(name)
    found = model(tokens, attention_mask=mask, position_ids=places).logits
    assert (found - expected)[mask.bool()].abs().max() < 1e-4
    assert torch.equal(model.generate(tokens, attention_mask=mask, max_new_tokens=12), generated)


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2"])
def test_padding_that_still_lies_in_the_ring_is_left_out(fake_flash, name):
    model = small_model(sliding_window=8)
    model.set_attn_implementation(name)
    batch = ids(9, batch=2)
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    out = model.generate(batch, attention_mask=mask, max_new_tokens=20)
    assert torch.equal(out[0, 6:], model.generate(batch[:1, 6:], max_new_tokens=20)[0])
    assert torch.equal(out[1], model.generate(batch[1:], max_new_tokens=20)[0])


def test_flash_attention_refuses_what_it_would_get_wrong(fake_flash):
    q, k, v = tensors(6, 6)
    holed = torch.tensor([[True] * 6, [True, True, False, True, True, True]])
    with pytest.raises(UnsupportedError, match="padding inside"):
        attend_with("flash_attention_2", q, k, v, AttentionMask(3, holed))
    pairs = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="4-D mask"):
        attend_with("flash_attention_2", q, k, v, AttentionMask(attn_mask=pairs))


def test_flash_attention_needs_its_package_a_gpu_and_a_half_precision():
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(UnsupportedError, match=r"not installed.*sdpa"):
            small_model().set_attn_implementation("flash_attention_2")
    with pytest.raises(UnsupportedError, match=r"float16 or bfloat16 on a CUDA device.*float32"):
        flash.check(tensors(2, 2)[0])


def test_names_are_checked_when_they_are_given(model):
    with pytest.raises(UsageError, match=r"attn_implementation.*eager, sdpa.*'fast'"):
        model.set_attn_implementation("fast")
    with pytest.raises(UsageError, match="attn_implementation"):
        MixtralForCausalLM.from_pretrained(TINY, device="cpu", attn_implementation="fast")
    assert attention.checked_implementation(None) == "sdpa"


def test_triton_is_there_or_says_that_it_is_not(model):
    try:
        model.set_attn_implementation("triton")
    except UnsupportedError as error:
        assert "Triton" in str(error)  # noqa: PT017
    else:
        with torch.no_grad():
            assert torch.isfinite(model(ids(4)).logits).all()


@torch.no_grad()
def test_the_attention_is_chosen_while_loading_and_is_not_saved(tmp_path):
    model = MixtralForCausalLM.from_pretrained(TINY, device="cpu", attn_implementation="eager")
    assert model.model.attn_implementation == "eager"
    other = MixtralForCausalLM.from_pretrained(TINY, device="cpu")
    assert other.model.attn_implementation == "sdpa"
    found, expected = (m(ids(8)).logits.log_softmax(-1) for m in (model, other))
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 1e-2
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_positions_beyond_the_models_bound_still_work():
    short, long = small_model(max_position_embeddings=8), small_model()
    assert torch.equal(short(ids(30)).logits, long(ids(30)).logits)


@pytest.mark.slow
@torch.no_grad()
def test_float16_stays_finite_at_8192_tokens():
    model = small_model(num_hidden_layers=1, hidden_size=32, intermediate_size=32).half()
    out = model.model(ids(8192), use_cache=False).last_hidden_state
    assert torch.isfinite(out).all()


@torch.no_grad()
def test_on_a_gpu_sdpa_leaves_to_triton_what_needs_a_mask(monkeypatch):
    """Which implementation is chosen on a made-up device; their results are tested elsewhere."""
    pytest.importorskip("triton")
    taken = []
    monkeypatch.setattr(kernels, "_fused", lambda *tensors: not kernels.overridden())
    monkeypatch.setitem(
        attention._IMPLEMENTATIONS,
        "triton",
        lambda q, k, v, mask, dropout: taken.append("triton") or q,
    )
    monkeypatch.setitem(
        attention._IMPLEMENTATIONS, "sdpa", lambda q, k, v, mask, dropout: taken.append("sdpa") or q
    )
    q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 8, 16)
    whole = torch.zeros(1, 4, 8, 16)
    no_padding = torch.ones(1, 8, dtype=torch.bool)

    def row(q, k, dropout=0.0, **mask):
        kernels.attend(q, k, k, AttentionMask(**mask), dropout=dropout)
        return taken.pop()

    assert row(whole, k) == "sdpa"  # causality alone
    assert row(whole, k, window=8) == "sdpa"
    assert (
        row(whole, k, window=4) == row(whole, k, padding_mask=no_padding) == row(q, k) == "triton"
    )
    assert row(q, k, attn_mask=torch.ones(1, 1, 3, 8, dtype=torch.bool)) == "sdpa"
    assert row(q, k, dropout=0.1) == "sdpa"
    assert row(q[..., :12], k[..., :12]) == "sdpa"
    with kernels.override("reference"):
        assert row(q, k) == "sdpa"


def test_the_triton_row_refuses_what_it_cannot():
    q = torch.zeros(1, 4, 3, 16)
    with pytest.raises(UnsupportedError, match="Triton"):
        attend_with("triton", q, q, q)
