"""Arguments and outputs of the public models, as Hugging Face's page on Mixtral lists them."""

import dataclasses

import pytest
import torch

from qmix.errors import UsageError
from qmix.models.mixtral import MixtralModel
from qmix.nn.outputs import MoeCausalLMOutputWithPast
from tests.support.models import ids, small_config, small_model

pytestmark = pytest.mark.filterwarnings("ignore:sdpa attention returns no weights")
LAYERS, HEADS, EXPERTS = 3, 8, 8


EVERYTHING = {
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "use_cache": True,
}


def test_outputs_are_read_by_attribute_key_and_place(model):
    out = model(ids(5), labels=ids(5), **EVERYTHING)
    assert out.keys() == (
        "loss",
        "aux_loss",
        "logits",
        "past_key_values",
        "hidden_states",
        "attentions",
        "router_logits",
    )
    assert out["logits"] is out.logits is out[2]
    assert out[:2] == (out.loss, out.aux_loss)
    assert dict(out)["router_logits"] is out[-1] is out.to_tuple()[-1]
    assert "loss" in out
    assert [*out] == [name for name, _ in out.items()]
    assert len(out) == len(out.values()) == 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.loss = None


def test_a_field_that_is_none_has_neither_key_nor_place(model):
    out = model(ids(5), use_cache=False)
    assert out.keys() == ("logits",)
    assert out[0] is out.logits
    assert out.loss is None
    with pytest.raises(KeyError):
        out["loss"]
    with pytest.raises(IndexError):
        out[1]


@torch.no_grad()
def test_return_dict_false_gives_the_values_in_the_pages_order(model):
    named = model(ids(5), labels=ids(5), **EVERYTHING)
    plain = model(ids(5), labels=ids(5), return_dict=False, **EVERYTHING)
    assert type(plain) is tuple
    for key, found in zip(named.keys(), plain, strict=True):
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, named[key])
        elif key != "past_key_values":
            assert all(torch.equal(a, b) for a, b in zip(found, named[key], strict=True))
    bare = model.model(ids(5), return_dict=False)
    assert torch.equal(bare[0], model.model(ids(5)).last_hidden_state)
    assert len(bare) == 2
    config = small_config(return_dict=False)
    assert type(MixtralModel(config)(ids(5))) is tuple


def test_arguments_stand_in_the_pages_order(model):
    tokens, mask = ids(6), torch.ones(1, 6)
    places = torch.arange(6)[None] + 5
    out = model(tokens, mask, places, None, None, tokens, False, True, True, True, True)
    assert out.past_key_values is None
    assert all(out[name] is not None for name in ("loss", "attentions", "hidden_states"))
    headless = model.model(tokens, mask, places, None, None, False, True, True, True, False)
    assert len(headless) == 4


@torch.no_grad()
def test_hidden_states_are_the_embeddings_then_each_layer_and_the_norm_last(model):
    tokens = ids(6, batch=2)
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    assert {tuple(h.shape) for h in out.hidden_states} == {(2, 6, 64)}
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(out.hidden_states[-1], model.model(tokens).last_hidden_state)
    assert torch.allclose(model.lm_head(out.hidden_states[-1]), out.logits)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_attentions_sum_to_one_over_the_keys_a_query_sees(window):
    model = small_model(sliding_window=window)
    out = model(ids(9, batch=2), output_attentions=True)
    assert [tuple(a.shape) for a in out.attentions] == [(2, HEADS, 9, 9)] * LAYERS
    for weights in out.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(2, HEADS, 9), atol=1e-6)
        seen = (weights > 0).sum(-1)
        expected = torch.arange(1, 10).clamp_max(window or 9)
        assert torch.equal(seen, expected.expand(2, HEADS, 9))


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4, 6])
def test_attentions_of_cached_pieces_are_the_rows_of_one_pass(window):
    model = small_model(sliding_window=window)
    tokens = ids(14)
    whole = model(tokens, output_attentions=True).attentions
    past, start = None, 0
    for piece in (3, 1, 5, 1, 1, 3):
        stop = start + piece
        out = model(tokens[:, start:stop], past_key_values=past, output_attentions=True)
        past = out.past_key_values
        for weights, expected in zip(out.attentions, whole, strict=True):
            held = weights.shape[-1]
            assert weights.shape == (1, HEADS, piece, held)
            rows = expected[:, :, start:stop, :stop]
            assert (weights - rows[..., stop - held :]).abs().max() < 1e-5
            assert not rows[..., : stop - held].any()
        start = stop


@torch.no_grad()
def test_attentions_of_a_padded_row_on_a_full_ring_leave_its_padding_out():
    model = small_model(sliding_window=6)
    tokens = ids(16, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    past = model(tokens[:, :9], attention_mask=mask[:, :9]).past_key_values
    whole = model(tokens, attention_mask=mask, output_attentions=True).attentions
    for at in range(9, 16):
        out = model(
            tokens[:, at : at + 1],
            attention_mask=mask[:, : at + 1],
            past_key_values=past,
            output_attentions=True,
        )
        for weights, expected in zip(out.attentions, whole, strict=True):
            row = expected[:, :, at, at + 1 - weights.shape[-1] : at + 1]
            assert (weights[:, :, 0] - row).abs().max() < 1e-5


@torch.no_grad()
def test_asking_for_attentions_says_that_eager_computes_them_and_changes_no_logits(model):
    with pytest.warns(UserWarning, match="eager attention"):
        out = model(ids(7), output_attentions=True)
    assert torch.allclose(out.logits, model(ids(7)).logits, atol=1e-5)
    model.set_attn_implementation("eager")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(ids(7), output_attentions=True).logits, model(ids(7)).logits)


@torch.no_grad()
def test_the_config_says_what_is_given_without_being_asked():
    model = small_model(
        output_attentions=True, output_hidden_states=True, output_router_logits=True
    )
    out = model(ids(5))
    assert len(out.attentions) == len(out.router_logits) == LAYERS
    assert len(out.hidden_states) == LAYERS + 1
    assert out.aux_loss is not None
    quiet = model(ids(5), output_attentions=False, output_hidden_states=False)
    assert quiet.attentions is quiet.hidden_states is None


@torch.no_grad()
def test_router_logits_are_raw_rows_of_all_tokens(model):
    out = model(ids(5, batch=2), output_router_logits=True)
    assert [tuple(r.shape) for r in out.router_logits] == [(10, EXPERTS)] * LAYERS
    assert not torch.allclose(out.router_logits[0].exp().sum(-1), torch.ones(10))


@torch.no_grad()
def test_the_cache_is_the_configs_default_and_off_while_training(model):
    assert model(ids(5)).past_key_values.length == 5
    assert model(ids(5), use_cache=False).past_key_values is None
    assert small_model(use_cache=False)(ids(5)).past_key_values is None
    assert model.train()(ids(5)).past_key_values is None
    assert model(ids(5), use_cache=True).past_key_values.length == 5


@torch.no_grad()
def test_a_past_may_be_a_tuple_of_keys_and_values_and_reads_as_one(model):
    tokens = ids(12)
    whole = model(tokens).logits
    past = model(tokens[:, :7]).past_key_values
    pairs = tuple((keys.clone(), values.clone()) for keys, values in past)
    assert [tuple(t.shape) for t in pairs[0]] == [(1, 2, 7, 8)] * 2
    assert len(past) == LAYERS
    assert torch.equal(past[-1][0], pairs[2][0])
    out = model(tokens[:, 7:], past_key_values=pairs)
    assert (out.logits - whole[:, 7:]).abs().max() < 1e-5
    for wrong in (pairs[:2], [(k[:, :1], v) for k, v in pairs], ()):
        with pytest.raises(UsageError, match="past_key_values"):
            model(tokens[:, 7:], past_key_values=wrong)


@torch.no_grad()
def test_a_cache_of_another_batch_is_refused(model):
    past = model(ids(5)).past_key_values
    with pytest.raises(UsageError, match="past_key_values"):
        model(ids(1, batch=2), past_key_values=past)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"sliding_window": 3},
        {"sliding_window": None},
        {"dtype": torch.float16},
        {"batch": 2},
    ],
    ids=str,
)
def test_a_cache_that_another_model_made_is_refused(changes):
    """A narrower window would have forgotten keys without an error."""
    model = small_model(sliding_window=6)
    rows, dtype = changes.pop("batch", 1), changes.pop("dtype", torch.float32)
    other = small_model(**{"sliding_window": 6, **changes}).to(dtype)
    cache = other(ids(4, batch=rows)).past_key_values
    for call in (
        lambda: model(ids(1), past_key_values=cache),
        lambda: MixtralModel(model.config).eval()(ids(1), past_key_values=cache),
        lambda: model.generate(ids(6), past_key_values=cache, max_new_tokens=1),
    ):
        with pytest.raises(UsageError, match="past_key_values"):
            call()


@pytest.mark.parametrize(
    "past",
    [object(), ((torch.ones(1, 2, 4, 8),) * 2,), (1, 2, 3)],
    ids=["an object", "the tuples of old", "integers"],
)
def test_what_is_no_cache_is_refused(model, past):
    with pytest.raises(UsageError, match="past_key_values"):
        model(ids(5), past_key_values=past)
    with pytest.raises(UsageError, match="past_key_values"):
        model.generate(ids(5), past_key_values=past, max_new_tokens=1)


@torch.no_grad()
def test_shifted_positions_change_nothing_but_must_agree_with_the_cache(model):
    tokens = ids(9)
    places = torch.arange(9)[None]
    whole = model(tokens).logits
    assert (model(tokens, position_ids=places + 5).logits - whole).abs().max() < 1e-4
    past = model(tokens[:, :6], position_ids=places[:, :6] + 5).past_key_values
    good = model(tokens[:, 6:], position_ids=places[:, 6:] + 5, past_key_values=past).logits
    assert (good - whole[:, 6:]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_mask", torch.ones(1, 4)),
        ("attention_mask", torch.ones(5)),
        ("attention_mask", torch.ones(1, 1, 4, 5)),
        ("attention_mask", torch.ones(1, 3, 5, 5)),
        ("attention_mask", torch.ones(1, 1, 5, 5, dtype=torch.long)),
        ("position_ids", torch.arange(5)),
        ("position_ids", torch.arange(4)[None]),
        ("labels", torch.ones(1, 4, dtype=torch.long)),
        ("labels", torch.full((1, 5), 128)),
        ("labels", torch.full((1, 5), -7)),
        ("labels", torch.ones(1, 5)),
        ("attention_mask", [[1, 1, 1, 1, 1]]),
        ("logits_to_keep", -1),
    ],
)
def test_a_wrong_shape_or_value_is_refused_by_its_name(model, name, value):
    with pytest.raises(UsageError, match=name):
        model(ids(5), **{name: value})


@pytest.mark.parametrize(
    "embeds",
    [
        torch.ones(5, 64),
        torch.ones(1, 5, 63),
        torch.ones(1, 0, 64),
        torch.ones(1, 5, 64, dtype=torch.long),
    ],
    ids=lambda embeds: f"{embeds.dtype} {list(embeds.shape)}",
)
def test_what_is_no_embedding_of_this_model_is_refused(model, embeds):
    for call in (model, model.model, model.generate):
        with pytest.raises(UsageError, match="inputs_embeds"):
            call(inputs_embeds=embeds)


def test_labels_may_be_any_whole_numbers(model):
    loss = model(ids(5), labels=ids(5)).loss
    assert torch.equal(model(ids(5), labels=ids(5).int()).loss, loss)


@torch.no_grad()
def test_a_4d_mask_stands_in_place_of_causality_and_window():
    model = small_model(sliding_window=4)
    tokens = ids(9, batch=2)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    seen = ((j <= i) & (j > i - 4))[None, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = model(tokens).logits
    for mask in (seen, added, seen.expand(2, HEADS, 9, 9)):
        for name in ("sdpa", "eager"):
            model.set_attn_implementation(name)
            assert (model(tokens, attention_mask=mask).logits - expected).abs().max() < 1e-5
    both_ways = model(tokens, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool)).logits
    assert (both_ways - expected).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_a_4d_mask_goes_with_a_cache_and_leaves_blind_queries_finite(model):
    tokens = ids(9)
    seen = torch.ones(9, 9).tril().bool()
    seen[:, 2] = False
    seen[4] = False
    mask = seen[None, None]
    whole = model(tokens, attention_mask=mask).logits
    assert torch.isfinite(whole).all()
    past = model(tokens[:, :5], attention_mask=mask[:, :, :5, :5]).past_key_values
    rest = model(tokens[:, 5:], attention_mask=mask[:, :, 5:], past_key_values=past).logits
    assert (rest - whole[:, 5:]).abs().max() < 1e-5
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        again = model(tokens, attention_mask=mask).logits
        assert (again - whole).abs().max() < 1e-5


def test_a_bool_or_float_mask_of_two_axes_is_the_same_mask(model):
    tokens = ids(6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        for other in (mask.bool(), mask.float()):
            assert torch.equal(model(tokens, attention_mask=other).logits, expected)


def test_hooks_of_the_inner_model_run(model):
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    model(ids(4))
    assert seen == [1]
    assert isinstance(model(ids(4)), MoeCausalLMOutputWithPast)


def test_losses_of_nothing_are_nan_as_in_transformers(model):
    assert torch.isnan(model(ids(5), labels=torch.full((1, 5), -100)).loss)


@torch.no_grad()
def test_the_aux_loss_of_a_cached_piece_is_that_of_its_own_tokens(model):
    tokens = ids(10, batch=2)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    past = model(tokens[:, :6], attention_mask=mask[:, :6]).past_key_values
    out = model(tokens[:, 6:], attention_mask=mask, past_key_values=past, output_router_logits=True)
    whole = model(tokens, attention_mask=mask, output_router_logits=True)
    kept = [r.view(2, 10, EXPERTS)[:, 6:].reshape(-1, EXPERTS) for r in whole.router_logits]
    from qmix.nn.losses import load_balancing_loss

    assert torch.allclose(out.aux_loss, load_balancing_loss(tuple(kept), 2), atol=1e-5)
    quiet = small_model(output_router_logits=True)
    assert quiet.generate(tokens, attention_mask=mask, max_new_tokens=3).shape == (2, 13)
