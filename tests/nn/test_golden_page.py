"""What Hugging Face's page on Mixtral lists, against values of three transformers versions.

golden/make_page.py wrote them: eager attention, float32. Known disagreements between the versions
are named where they are tested; everything else agrees to 1e-5 among the three.
"""

import json
from functools import cache

import pytest
import torch
from safetensors import safe_open

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.classifier import MixtralForSequenceClassification
from tests.support import exact
from tests.support.models import GOLDEN

pytestmark = pytest.mark.filterwarnings("ignore:sdpa attention returns no weights")
VERSIONS = ("4.38.1", "4.47.1", "5.23.0")
CASES = exact.page_cases()
TOLERANCE = 1e-4


@cache
def golden(version):
    with safe_open(GOLDEN / f"page-{version}.safetensors", "pt") as file:
        assert json.loads(file.metadata()["cases"]) == CASES
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def seed_of(name):
    return exact.PAGE_SEED + list(CASES).index(name)


@cache
def causal(name):
    model = MixtralForCausalLM(MixtralConfig.from_dict(CASES[name]))
    weights = exact.weights(exact.mixtral_shapes(CASES[name]), seed_of(name))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    return model.eval()


def classifier(name, **changes):
    labels = changes.get("num_labels", exact.LABELS)
    config = MixtralConfig.from_dict({**CASES[name], "num_labels": labels, **changes})
    model = MixtralForSequenceClassification(config)
    weights = exact.weights(exact.mixtral_shapes(CASES[name]), seed_of(name))
    del weights["lm_head.weight"]
    weights["score.weight"] = exact.score_weight(seed_of(name))[:labels]
    model.load_state_dict(weights)
    return model.eval()


def agree(found, name, key, versions=VERSIONS):
    for version in versions:
        expected = golden(version)[f"{name}.{key}"]
        assert found.shape == expected.shape, version
        assert float((found - expected).abs().max()) < TOLERANCE, version


detailed = pytest.mark.parametrize("name", exact.DETAILED)
implementations = pytest.mark.parametrize("attention", ["eager", "sdpa"])


@torch.no_grad()
@implementations
@pytest.mark.parametrize("name", CASES)
def test_each_field_of_the_config_has_its_effect(name, attention):
    """head_dim came after 4.47.1. The sdpa of 4.38.1 ignores the window: these are eager's."""
    model = causal(name)
    model.set_attn_implementation(attention)
    ids, *_ = exact.golden_inputs(seed_of(name))
    versions = VERSIONS[2:] if name == "head_dim" else VERSIONS
    agree(model(ids).logits[0], name, "logits", versions)


@torch.no_grad()
@detailed
def test_hidden_states_are_those_of_transformers(name):
    ids, *_ = exact.golden_inputs(seed_of(name))
    out = causal(name)(ids, output_hidden_states=True)
    agree(torch.stack(out.hidden_states), name, "hidden_states")


@torch.no_grad()
@implementations
@detailed
def test_attentions_are_those_of_transformers(name, attention):
    """5.23 gives an empty tuple where its attention is sdpa; these are eager's."""
    model = causal(name)
    model.set_attn_implementation(attention)
    ids, *_ = exact.golden_inputs(seed_of(name))
    agree(torch.stack(model(ids, output_attentions=True).attentions), name, "attentions")


@torch.no_grad()
@implementations
@detailed
def test_padding_on_any_side_gives_the_logits_of_transformers(name, attention):
    """At masked positions the versions differ by up to 3.9: those values are undefined."""
    model = causal(name)
    model.set_attn_implementation(attention)
    batch, mask = exact.page_batch(seed_of(name))
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    logits = model(batch, attention_mask=mask, position_ids=places).logits
    assert torch.isfinite(logits).all()
    agree(logits.masked_fill(mask[..., None] == 0, 0.0), name, "padded")


@torch.no_grad()
@implementations
@detailed
def test_a_mask_of_four_axes_gives_the_logits_of_transformers(name, attention):
    """4.38.1 has no such mask."""
    model = causal(name)
    model.set_attn_implementation(attention)
    ids, *_ = exact.golden_inputs(seed_of(name))
    seen = exact.page_pairs()
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added):
        agree(model(ids, attention_mask=mask).logits, name, "pairs", VERSIONS[1:])


@torch.no_grad()
@detailed
def test_classes_are_those_of_transformers(name):
    """With a pad inside the text 4.x reads the position before it, 5.x the last of the text."""
    batch, mask = exact.page_batch(seed_of(name))
    model = classifier(name)
    found = model(batch, attention_mask=mask).logits
    agree(found, name, "classes", VERSIONS[2:])
    hidden = model.model(batch, attention_mask=mask).last_hidden_state
    agree(torch.cat((found[:3], model.score(hidden[3:, 7]))), name, "classes", VERSIONS[:2])
    alone = classifier(name, pad_token_id=None)
    agree(alone(batch[2:3]).logits, name, "classes_without_pad")
    with pytest.raises(UsageError, match="pad_token_id"):
        alone(batch)
    one = classifier(name, num_labels=1)
    agree(one(batch[:3], attention_mask=mask[:3]).logits, name, "regression")
    embeds = one.get_input_embeddings()(batch[2:3])
    agree(one(inputs_embeds=embeds).logits, name, "regression_of_embeds")


@torch.no_grad()
@detailed
def test_losses_of_classes_are_those_of_transformers(name):
    batch, mask = (t[:3] for t in exact.page_batch(seed_of(name)))
    kinds = (
        ("class_loss", "single_label_classification", exact.LABELS),
        ("regression_loss", "regression", 1),
        ("several_loss", "multi_label_classification", exact.LABELS),
    )
    for (key, problem, labels), given in zip(kinds, exact.page_labels(), strict=True):
        model = classifier(name, num_labels=labels)
        agree(model(batch, attention_mask=mask, labels=given[:3]).loss, name, key)
        assert model.config.problem_type == problem
