"""forward takes Hugging Face's arguments in their order (v4.38.1's page of Mixtral), then ours."""

import inspect

import pytest
import torch

import qmix
from tests.support.models import small_config

FIRST = ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"]
FLAGS = ["use_cache", "output_attentions", "output_hidden_states"]
SIGNATURES = {
    qmix.MixtralModel: [*FIRST, *FLAGS, "output_router_logits", "return_dict"],
    qmix.MixtralForCausalLM: [
        *(*FIRST, "labels", *FLAGS, "output_router_logits", "return_dict"),
        "logits_to_keep",
    ],
    qmix.MixtralForSequenceClassification: [
        *(*FIRST, "labels", *FLAGS, "return_dict"),
        "output_router_logits",
    ],
}
IDS = torch.tensor([[1, 5, 6, 7]])


@pytest.mark.parametrize("model", SIGNATURES, ids=lambda model: model.__name__)
def test_the_arguments_can_be_inspected_and_are_documented(model):
    parameters = inspect.signature(model.forward).parameters
    assert list(parameters) == ["self", *SIGNATURES[model]]
    assert all(p.default is not p.empty for name, p in parameters.items() if name != "self")
    assert "One pass over (B, S) new positions" in inspect.getdoc(model.forward)
    bound = inspect.signature(model(small_config(num_hidden_layers=1)).forward)
    assert list(bound.parameters) == SIGNATURES[model]


@torch.no_grad()
@pytest.mark.parametrize("model", SIGNATURES, ids=lambda model: model.__name__)
def test_arguments_go_by_position_and_by_name(model):
    torch.manual_seed(0)
    model = model(small_config(num_hidden_layers=1)).eval()
    mask = torch.tensor([[0, 1, 1, 1]])
    by_name = model(input_ids=IDS, attention_mask=mask, use_cache=False, return_dict=False)
    by_position = model(IDS, mask, use_cache=False, return_dict=False)
    assert torch.equal(by_name[0], by_position[0])
    with pytest.raises(TypeError, match="magic"):
        model(IDS, magic=True)


@torch.no_grad()
def test_hooks_on_the_decoder_see_a_heads_pass():
    model = qmix.MixtralForCausalLM(small_config(num_hidden_layers=1)).eval()
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append(1))
    model(IDS)
    assert seen == [1]
