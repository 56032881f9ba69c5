import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import UsageError
from qmix.generation.padding import (
    check_embeds,
    check_prompt,
    left_padded,
    position_ids,
    without_full_mask,
)

ROWS = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4)


@given(ROWS)
def test_padding_moves_left_and_the_rest_keeps_its_order(rows):
    attention_mask = torch.tensor(rows)
    columns = torch.arange(attention_mask.numel()).view(attention_mask.shape)
    moved, mask = left_padded(columns, attention_mask)
    for row, kept, found, seen in zip(columns, attention_mask, moved, mask, strict=True):
        assert seen.tolist() == sorted(seen.tolist())
        assert found[seen].tolist() == row[kept].tolist()
        assert sorted(found.tolist()) == row.tolist()


def test_embeddings_move_with_their_padding():
    embeds = torch.arange(6.0).view(1, 3, 2)
    moved, mask = left_padded(embeds, torch.tensor([[True, False, True]]))
    assert moved.tolist() == [[[2, 3], [0, 1], [4, 5]]]
    assert mask.tolist() == [[False, True, True]]


def test_positions_do_not_count_padding():
    attention_mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert position_ids(attention_mask, 4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert position_ids(attention_mask, 1).tolist() == [[1], [3]]
    assert position_ids(None, 4) is None
    assert without_full_mask(torch.ones(1, 3, dtype=torch.bool), torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (None, "NoneType"),
        (torch.zeros(3), "float32"),
        (torch.zeros(1, 0, dtype=torch.long), "empty"),
    ],
)
def test_what_is_no_prompt_is_refused(ids, named):
    with pytest.raises(UsageError, match=named):
        check_prompt(ids, None)


@pytest.mark.parametrize(
    "embeds", [None, torch.zeros(2, 3), torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 4)]
)
def test_what_is_no_embedding_is_refused(embeds):
    with pytest.raises(UsageError, match="inputs_embeds"):
        check_embeds(embeds, None, 3)


def test_masks_must_fit_and_keep_something():
    embeds = torch.zeros(1, 2, 3)
    for mask in (torch.ones(1, 3), torch.zeros(1, 2)):
        with pytest.raises(UsageError, match="attention_mask"):
            check_embeds(embeds, mask.bool(), 3)
