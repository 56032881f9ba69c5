"""Properties of the decoder that hold for any weights. Values against transformers: test_golden."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import UsageError
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.mixtral import MixtralModel
from qmix.nn.losses import load_balancing_loss
from tests.support.models import ids, small_config, small_model


@torch.no_grad()
def logits(model, tokens, **options):
    return model(input_ids=tokens, **options).logits


@given(
    window=st.sampled_from([None, 1, 2, 5, 8, 16]),
    pieces=st.lists(st.integers(1, 12), min_size=1, max_size=6),
)
def test_any_split_into_cached_chunks_gives_the_same_logits(window, pieces):
    model = small_model(sliding_window=window, num_hidden_layers=2)
    tokens = ids(sum(pieces))
    whole = logits(model, tokens)
    past, parts, start = None, [], 0
    with torch.no_grad():
        for piece in pieces:
            out = model(input_ids=tokens[:, start : start + piece], past_key_values=past)
            past, start = out.past_key_values, start + piece
            parts.append(out.logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("window", [1, 4, 8])
def test_a_token_reaches_exactly_layers_times_window_minus_one_further(window):
    model = small_model(sliding_window=window)
    tokens, t = ids(48), 10
    changed = tokens.clone()
    changed[0, t] = (changed[0, t] + 7) % 100 + 3
    # Other groups of tokens an expert round differently in the last bit: 1e-6 is not a difference.
    moved = (logits(model, tokens) - logits(model, changed)).abs().amax(-1)[0] > 1e-5
    reach = t + 3 * (window - 1)
    assert moved[t : reach + 1].all()
    assert not moved[:t].any()
    assert not moved[reach + 1 :].any()


def test_a_window_as_long_as_the_text_is_full_attention():
    full, windowed = small_model(), small_model(sliding_window=20)
    assert torch.equal(logits(full, ids(20)), logits(windowed, ids(20)))


@pytest.mark.parametrize("window", [None, 8])
def test_left_padding_does_not_change_a_row(window):
    model = small_model(sliding_window=window)
    tokens = ids(12)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), tokens), 1)
    mask = torch.tensor([[0] * 5 + [1] * 12])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    out = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert (out[:, 5:] - logits(model, tokens)).abs().max() < 1e-4
    assert torch.isfinite(out).all()


def test_logits_to_keep_equals_the_slice_and_computes_no_other_row(model):
    tokens = ids(9, batch=2)
    whole = logits(model, tokens)
    seen = []
    model.lm_head.register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].shape[:-1].numel())
    )
    assert torch.allclose(logits(model, tokens, logits_to_keep=3), whole[:, -3:], atol=1e-6)
    picked = logits(model, tokens, logits_to_keep=torch.tensor([0, 4]))
    assert torch.allclose(picked, whole[:, [0, 4]], atol=1e-6)
    model.generate(tokens, max_new_tokens=2)
    assert seen == [6, 4, 2, 2]  # rows of both prompts, then one row each a step
    assert whole.dtype == torch.float32


def test_inputs_embeds_equal_their_ids_and_both_or_neither_are_refused(model):
    tokens = ids(6)
    embeds = model.model.embed_tokens(tokens)
    assert torch.equal(logits(model, tokens), logits(model, None, inputs_embeds=embeds))
    with pytest.raises(UsageError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(UsageError, match="input_ids or inputs_embeds"):
        model(input_ids=tokens, inputs_embeds=embeds)


@pytest.mark.parametrize("bad", [-1, 128])
def test_ids_outside_the_vocabulary_are_refused(model, bad):
    with pytest.raises(UsageError, match="vocabulary"):
        model(input_ids=torch.tensor([[5, bad]]))


def test_router_logits_are_raw_and_one_tensor_a_layer(model):
    out = model(input_ids=ids(7, batch=2), output_router_logits=True)
    assert [tuple(r.shape) for r in out.router_logits] == [(14, 8)] * 3
    assert not torch.allclose(out.router_logits[0].sum(-1), torch.ones(14))
    assert model(input_ids=ids(7)).router_logits is None


def test_loss_is_shifted_cross_entropy_plus_the_weighted_aux_loss(model):
    tokens = ids(10, batch=2)
    labels = tokens.clone()
    labels[:, :4] = -100
    out = model(input_ids=tokens, labels=labels, output_router_logits=True)
    rows = out.logits[:, :-1].flatten(0, 1).log_softmax(-1)
    targets = labels[:, 1:].flatten()
    nll = -rows[targets != -100].gather(1, targets[targets != -100][:, None]).mean()
    assert torch.allclose(out.loss, nll + 0.001 * out.aux_loss, atol=1e-6)
    assert torch.allclose(model(input_ids=tokens, labels=labels).loss, nll, atol=1e-6)


def test_aux_loss_of_a_uniform_router_is_the_number_of_chosen_experts():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 3):
        gates = tuple(1e-6 * torch.randn(20_000, 8, generator=generator) for _ in range(2))
        assert abs(float(load_balancing_loss(gates, k)) - k) < 1e-2


def test_aux_loss_ignores_padding():
    gates = tuple(torch.randn(12, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    padded = tuple(torch.cat((g[:6], torch.randn(4, 8), g[6:])) for g in gates)
    mask = torch.tensor([[1] * 6 + [0] * 4 + [1] * 6])
    expected = load_balancing_loss(gates, 2)
    assert torch.allclose(load_balancing_loss(padded, 2, mask), expected, atol=1e-6)


def test_the_model_trains():
    model = small_model(num_hidden_layers=1, router_jitter_noise=0.01, attention_dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = ids(16, batch=4)
    losses = []
    model.train()
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    gate = model.model.layers[0].block_sparse_moe.gate.weight
    assert gate.grad.abs().max() > 0


def test_default_config_builds_on_meta_without_memory():
    from qmix.config import MixtralConfig

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig())
    assert sum(p.numel() for p in model.parameters()) == 46_702_792_704


def test_state_dict_has_the_hubs_names(model):
    names = model.state_dict().keys()
    assert "model.layers.2.block_sparse_moe.experts.7.w3.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    assert len(names) == 3 + 3 * (4 + 2 + 1 + 24)


def test_tied_embeddings_are_one_tensor(tmp_path):
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = MixtralForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again, ids(5)), logits(model, ids(5)))


def test_save_and_load_are_exact_and_the_headless_model_reads_the_same_files(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "whole")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    headless = MixtralModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        hidden = headless(input_ids=ids(5), output_hidden_states=True)
        assert torch.allclose(model.lm_head(hidden.last_hidden_state), logits(model, ids(5)))
    assert len(hidden.hidden_states) == 4
    assert torch.equal(hidden.hidden_states[-1], hidden.last_hidden_state)


def test_a_pass_that_is_interrupted_leaves_the_cache_as_it_was(model):
    with torch.no_grad():
        past = model(input_ids=ids(5)).past_key_values
        whole = logits(model, ids(6))

        def stop(*_):
            raise KeyboardInterrupt

        hook = model.model.layers[2].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids(6)[:, 5:], past_key_values=past)
        hook.remove()
        assert past.length == 5
        again = model(input_ids=ids(6)[:, 5:], past_key_values=past).logits
    assert (again[:, 0] - whole[:, 5]).abs().max() < 1e-4


def test_rewinding_the_cache_forgets_exactly_the_rest(model):
    with torch.no_grad():
        past = model(input_ids=ids(20)).past_key_values
        past.rewind(8)
        other = ids(15, seed=5)
        other[:, :8] = ids(20)[:, :8]
        out = model(input_ids=other[:, 8:], past_key_values=past).logits
    assert (out - logits(model, other)[:, 8:]).abs().max() < 1e-4
    with pytest.raises(UsageError):
        past.rewind(99)


def test_gelu_and_other_activations_differ_from_silu():
    outputs = [logits(small_model(hidden_act=act), ids(6)) for act in ("silu", "gelu", "relu")]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])
    assert torch.equal(outputs[0], logits(small_model(hidden_act="swish"), ids(6)))


def test_half_precisions_stay_close_to_float32():
    model = small_model()
    exact = logits(model, ids(24)).log_softmax(-1)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = logits(small_model().to(dtype), ids(24)).log_softmax(-1)
        kl = (exact.exp() * (exact - rounded)).sum(-1).mean()
        assert kl < 0.05, dtype


def test_two_runs_give_equal_bits(model):
    assert torch.equal(logits(model, ids(33, batch=3)), logits(model, ids(33, batch=3)))


def test_small_config_blocks_straddle_rows():
    assert small_config().intermediate_size % 64
