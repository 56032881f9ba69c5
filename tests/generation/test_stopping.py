import pytest
import torch

from qmix.errors import UsageError
from qmix.generation.stopping import RowText, rows_to_stop
from qmix.text.detokenizer import StreamDetokenizer
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY

TOKENIZER = LlamaTokenizer.from_pretrained(TINY)


def row(*stops, eos=(2,)):
    return RowText(StreamDetokenizer(TOKENIZER), eos, stops)


def put(row, ids):
    return [row.put(i, last=at + 1 == len(ids)) for at, i in enumerate(ids)]


def test_text_that_may_become_a_stop_is_held_until_it_is_none():
    ids = TOKENIZER.encode("the list of the lists", add_special_tokens=False)
    pieces = put(row("list of all"), ids)
    assert "".join(pieces) == "the list of the lists"
    assert "" in pieces


def test_a_row_ends_at_the_first_stop_and_stays_ended():
    ids = TOKENIZER.encode("the list of the lists", add_special_tokens=False)
    ended = row(" of", "lists")
    assert "".join(put(ended, ids)) == "the list"
    assert ended.ended
    assert ended.put(ids[0], last=True) == ""


def test_an_end_id_lets_go_of_what_was_held():
    ids = TOKENIZER.encode("the", add_special_tokens=False)
    ended = row("the whole")
    assert "".join([*(ended.put(i, last=False) for i in ids), ended.put(2, last=False)]) == "the"
    assert ended.ended


@pytest.mark.parametrize(
    ("verdict", "rows"),
    [
        (True, [True, True]),
        (False, [False, False]),
        (torch.tensor([True, False]), [True, False]),
        (torch.tensor(True), [True, True]),
    ],
)
def test_a_criterion_speaks_for_all_rows_or_for_each(verdict, rows):
    found = rows_to_stop(lambda ids, scores: verdict, torch.zeros(2, 3), torch.zeros(2, 4))
    assert found.tolist() == rows


@pytest.mark.parametrize("verdict", [None, 1, "yes", torch.tensor([True] * 3)])
def test_another_verdict_is_refused(verdict):
    with pytest.raises(UsageError, match="stopping_criteria"):
        rows_to_stop(lambda ids, scores: verdict, torch.zeros(2, 3), torch.zeros(2, 4))
