"""MixtralForSequenceClassification. Values against transformers: test_golden_page."""

import json

import pytest
import torch

from qmix.config import MixtralConfig
from qmix.errors import ConfigError, UsageError
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.classifier import MixtralForSequenceClassification
from tests.support.models import ids, small_config, small_model


def small_classifier(**changes):
    torch.manual_seed(0)
    return MixtralForSequenceClassification(small_config(**changes)).eval()


@torch.no_grad()
def test_the_position_is_the_last_that_is_no_padding():
    model = small_classifier(num_labels=4)
    batch = ids(8, batch=4)
    batch[1, 5:] = 0  # right
    batch[2, :3] = 0  # left
    batch[3, 3] = 0  # inside: the text goes on, and 7 is read, not 2
    hidden = model.model(batch).last_hidden_state
    places = torch.tensor([7, 4, 7, 7])
    expected = model.score(hidden[torch.arange(4), places])
    assert torch.allclose(model(batch).logits, expected, atol=1e-6)
    assert torch.isfinite(model(torch.zeros(2, 5, dtype=torch.long)).logits).all()
    embeds = model.get_input_embeddings()(batch)
    last = model.score(model.model(inputs_embeds=embeds).last_hidden_state[:, -1])
    assert torch.allclose(model(inputs_embeds=embeds).logits, last, atol=1e-6)


@torch.no_grad()
def test_without_a_padding_id_one_row_is_read_at_its_end_and_several_are_refused():
    for pad in (None, -1):
        model = small_classifier(pad_token_id=pad)
        row = ids(6)
        expected = model.score(model.model(row).last_hidden_state[:, -1])
        assert torch.allclose(model(row).logits, expected, atol=1e-6)
        with pytest.raises(UsageError, match="pad_token_id"):
            model(ids(6, batch=2))


@torch.no_grad()
def test_outputs_stand_in_the_pages_order_and_router_logits_are_taken():
    model = small_classifier(num_labels=3)
    tokens = ids(6, batch=2)
    model.set_attn_implementation("eager")
    out = model(
        tokens, labels=torch.tensor([0, 2]), output_attentions=True, output_hidden_states=True
    )
    assert out.keys() == ("loss", "logits", "past_key_values", "hidden_states", "attentions")
    assert tuple(out.logits.shape) == (2, 3)
    assert out.logits.dtype == torch.float32
    assert type(model(tokens, return_dict=False)) is tuple
    assert len(model(tokens, output_router_logits=True).router_logits) == 3
    again = model(tokens, torch.ones(2, 6), None, None, None, torch.tensor([0, 2]), False)
    assert again.past_key_values is None
    assert torch.allclose(again.loss, out.loss)


def test_the_kind_of_labels_chooses_the_loss_and_the_config_keeps_it():
    tokens = ids(6, batch=2)
    several = small_classifier(num_labels=3)
    weights = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    loss = several(tokens, labels=weights).loss
    expected = torch.nn.functional.binary_cross_entropy_with_logits(several(tokens).logits, weights)
    assert torch.allclose(loss, expected)
    assert several.config.problem_type == "multi_label_classification"
    one = small_classifier(num_labels=1)
    loss = one(tokens, labels=torch.tensor([1, 2])).loss
    assert torch.allclose(loss, (one(tokens).logits[:, 0] - torch.tensor([1.0, 2.0])).pow(2).mean())
    assert one.config.problem_type == "regression"
    named = small_classifier(num_labels=3, problem_type="regression")
    loss = named(tokens, labels=weights).loss
    assert torch.allclose(loss, (named(tokens).logits - weights).pow(2).mean())


@pytest.mark.parametrize(
    ("changes", "labels", "named"),
    [
        ({"num_labels": 3}, torch.tensor([0, 3]), "labels"),
        ({"num_labels": 3}, torch.tensor([0]), "labels"),
        ({"num_labels": 3}, torch.zeros(2, 2), "labels"),
        ({"num_labels": 1}, torch.zeros(3), "labels"),
        ({"num_labels": 3, "problem_type": "guessing"}, torch.tensor([0, 1]), "problem_type"),
    ],
)
def test_labels_that_do_not_fit_are_refused(changes, labels, named):
    with pytest.raises(UsageError, match=named):
        small_classifier(**changes)(ids(6, batch=2), labels=labels)


def test_the_number_of_labels_is_read_as_transformers_writes_it():
    assert MixtralConfig().num_labels == 2
    assert MixtralConfig(id2label={"0": "a", "1": "b", "2": "c"}).num_labels == 3
    for wrong in (0, "3", True, 1 << 40):
        with pytest.raises(ConfigError, match="num_labels"):
            small_classifier(num_labels=wrong)


@torch.no_grad()
def test_a_classifier_survives_save_and_load(tmp_path):
    model = small_classifier(num_labels=5)
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["architectures"] == ["MixtralForSequenceClassification"]
    again = MixtralForSequenceClassification.from_pretrained(tmp_path, device="cpu")
    assert again.config.num_labels == 5
    assert torch.equal(again(ids(6)).logits, model(ids(6)).logits)


@torch.no_grad()
def test_a_causal_checkpoint_lends_its_decoder_and_the_classes_are_said_to_be_random(tmp_path):
    small_model().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"score\.weight.*random"):
        model = MixtralForSequenceClassification.from_pretrained(
            tmp_path, device="cpu", num_labels=4
        )
    assert tuple(model(ids(6)).logits.shape) == (1, 4)
    causal = MixtralForCausalLM.from_pretrained(tmp_path, device="cpu")
    hidden = causal.model(ids(6)).last_hidden_state
    assert torch.equal(model.model(ids(6)).last_hidden_state, hidden)


@pytest.mark.filterwarnings("ignore:the checkpoint has no score.weight")
@torch.no_grad()
def test_a_4_bit_decoder_classifies(tiny_nf4):
    model = MixtralForSequenceClassification.from_pretrained(
        tiny_nf4, device="cpu", num_labels=3, pad_token_id=0, dtype="float32"
    )
    batch = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    logits = model(batch, attention_mask=batch != 0).logits
    assert torch.isfinite(logits).all()
    alone = model(batch[:1, :3]).logits
    assert (logits[0] - alone[0]).abs().max() < 1e-4


def test_a_classifier_trains():
    model = small_classifier(num_labels=2, num_hidden_layers=1).train()
    batch, labels = ids(8, batch=8), torch.tensor([0, 1] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
