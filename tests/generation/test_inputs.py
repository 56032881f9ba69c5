"""GenerationInputs: what goes together, copies of rows, padding moved to the left; and Rows."""

import pytest
import torch

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.rows import Rows
from tests.support.models import small_model

IDS = torch.tensor([[5, 0, 6], [7, 8, 9]])
MASK = torch.tensor([[1, 0, 1], [1, 1, 1]])
EMBEDS = torch.zeros(1, 3, 4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (GenerationInputs(None), "input_ids"),
        (GenerationInputs(IDS, inputs_embeds=EMBEDS), "not both"),
        (GenerationInputs(None, inputs_embeds=torch.zeros(1, 3, 5)), "inputs_embeds"),
        (GenerationInputs(None, GenerationConfig(use_cache=False), inputs_embeds=EMBEDS), "cache"),
        (GenerationInputs(IDS, GenerationConfig(stop_strings="x")), "tokenizer"),
        (GenerationInputs(IDS, attention_mask=MASK[:, :2]), "attention_mask"),
    ],
    ids=["nothing", "both", "width", "no cache", "no tokenizer", "mask"],
)
def test_parts_that_do_not_go_together_are_refused(inputs, message):
    with pytest.raises(UsageError, match=message):
        inputs.check(4)


def test_a_mask_is_kept_as_bool_and_must_be_a_tensor():
    assert GenerationInputs(IDS, attention_mask=MASK).attention_mask.dtype == torch.bool
    with pytest.raises(UsageError, match=r"attention_mask.*list"):
        GenerationInputs(IDS, attention_mask=[[1, 1, 1]])


def test_each_row_is_followed_by_its_copies():
    copied = GenerationInputs(IDS, attention_mask=MASK).repeated(2)
    assert copied.input_ids.tolist() == [[5, 0, 6]] * 2 + [[7, 8, 9]] * 2
    assert copied.attention_mask.sum(1).tolist() == [2, 2, 3, 3]
    embeds = GenerationInputs(None, inputs_embeds=EMBEDS).repeated(3)
    assert embeds.columns.shape == (3, 3, 4)
    assert embeds.prompt_ids.shape == (3, 0)


def test_padding_moves_left_unless_the_cache_holds_columns():
    inputs = GenerationInputs(IDS, attention_mask=MASK)
    moved = inputs.left_padded()
    assert moved.input_ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert moved.attention_mask.tolist() == [[False, True, True], [True] * 3]
    cache = small_model().new_cache(2)
    cache.length = 1
    prefilled = GenerationInputs(IDS, attention_mask=MASK, cache=cache)
    with pytest.raises(UsageError, match="left only"):
        prefilled.left_padded()
    assert GenerationInputs(IDS, cache=cache).left_padded().input_ids is IDS


def test_rows_that_have_ended_get_padding_and_the_mask_grows_with_the_ids():
    config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    inputs = GenerationInputs(IDS, config, attention_mask=MASK).left_padded()
    rows = Rows(inputs, torch.device("cpu"))
    scores = torch.zeros(2, 16)
    ids, texts = rows.append(torch.tensor([2, 11]), scores, last=False)
    assert (ids.tolist(), texts) == ([2, 11], ())
    assert rows.ended.tolist() == [True, False]
    rows.append(torch.tensor([12, 13]), scores, last=False)
    assert rows.input_ids.tolist() == [[0, 5, 6, 2, 0], [7, 8, 9, 11, 13]]
    assert rows.attention_mask.tolist() == [[False, *[True] * 4], [True] * 5]
    assert rows.ids_mask.shape == rows.input_ids.shape


def test_the_mask_of_a_step_is_a_longer_part_of_the_last_ones_memory():
    """So that padding costs no operation a step."""
    inputs = GenerationInputs(IDS, GenerationConfig(), attention_mask=MASK).left_padded()
    rows = Rows(inputs, torch.device("cpu"))
    scores, ids = torch.zeros(2, 16), torch.tensor([3, 4])
    rows.append(ids, scores, last=False)
    before = rows.attention_mask
    for columns in range(5, 5 + 40):
        rows.append(ids, scores, last=False)
        mask = rows.attention_mask
        assert mask.shape == (2, columns)
        assert mask.data_ptr() == before.data_ptr()
        assert mask[:, 3:].all()
    for _ in range(1100):
        rows.append(ids, scores, last=False)
    assert rows.attention_mask.shape == (2, 1144)
    assert rows.attention_mask.tolist() == [[False, *[True] * 1143], [True] * 1144]
