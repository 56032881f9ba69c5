"""Misuse of generate: wrong types, shapes and values are refused as usage, or harmless."""

import pytest
import torch

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig

IDS = torch.tensor([[1, 5, 6, 7]])


@pytest.mark.parametrize(
    "ids",
    [IDS[0], IDS[None], IDS.float(), IDS.bool(), [[1, 2]], None],
    ids=["1-D", "3-D", "float", "bool", "list", "None"],
)
def test_unfit_prompt_ids_are_refused_as_usage(model, ids):
    with pytest.raises(UsageError, match="input_ids"):
        model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[0, 1, 1, 1, 1]], [[0, 1, 1, 1]] * 2])
def test_a_mask_of_another_shape_than_the_prompt_is_refused_as_usage(model, mask):
    with pytest.raises(UsageError, match="attention_mask"):
        model.generate(IDS, attention_mask=torch.tensor(mask), max_new_tokens=2)


def test_padding_on_the_right_is_refused_warned_of_or_right(model):
    ids, mask = torch.tensor([[1, 5, 6, 0], IDS[0].tolist()]), torch.ones(2, 4, dtype=torch.long)
    mask[0, 3] = 0
    alone = model.generate(ids[:1, :3], max_new_tokens=8)[0, 3:]
    try:
        padded = model.generate(ids, attention_mask=mask, max_new_tokens=8)[0, 4:]
    except (UsageError, UserWarning):
        return
    assert torch.equal(padded, alone)


@pytest.mark.parametrize(
    "option",
    [
        {"seed": "1"},
        {"seed": 1.5},
        {"seed": True},
        {"stop_strings": 5},
        {"eos_token_id": "2"},
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_refused_as_usage(model, option):
    with pytest.raises(UsageError):
        model.generate(IDS, max_new_tokens=3, **option)


def test_a_temperature_too_small_for_float32_is_greedy_or_refused_but_no_damage_is_claimed(model):
    greedy = model.generate(IDS, max_new_tokens=3)
    try:
        config = GenerationConfig(do_sample=True, temperature=1e-300, seed=0, max_new_tokens=3)
        drawn = model.generate(IDS, generation_config=config)
    except UsageError:
        return
    assert torch.equal(drawn, greedy)
