"""Where the numbers are hidden, and what counts as found."""

import re

import pytest
import torch

from qmix.errors import UsageError
from qmix.evals.quality.needles import DEPTHS, Needles
from qmix.evals.quality.texts import Text
from qmix.evals.quality.token_scores import TokenScores
from qmix.formats import open_checkpoint
from qmix.text.tokenizer import LlamaTokenizer

TEXT = Text.of("".join(f"Line {number} of the text returns a list.\n" for number in range(300)))
SIZE, TRIALS = 200, 2


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return LlamaTokenizer.from_pretrained(tiny)


def windows(tiny, tokenizer, text=TEXT, size=SIZE):
    needles = Needles(text, TRIALS, size)
    return needles.windows(open_checkpoint(tiny), tokenizer, tokenizer.encode(text.content))


def test_each_window_states_a_number_at_its_depth_and_asks_for_it(tiny, tokenizer):
    found = windows(tiny, tokenizer)
    assert found.ids.shape == (len(DEPTHS) * TRIALS, SIZE)
    numbers = set()
    for row, (ids, scored) in enumerate(
        zip(found.ids.tolist(), found.scored.tolist(), strict=True)
    ):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        stated = re.search(r"The secret number of (\w+) is (\d{5})\.", text)
        place, number = stated.groups()
        assert text.endswith(f"What is the secret number of {place}? The secret number of {place} is {number}")  # fmt: skip
        answer = [index for index, on in zip(ids, scored, strict=True) if on]
        assert tokenizer.decode(answer).strip() == number
        assert scored[-len(answer) :] == [True] * len(answer)
        before, after = text[: stated.start()], text[stated.end() : text.index("What is the")]
        share = len(before) / len(before + after)
        assert share == pytest.approx(DEPTHS[row // TRIALS], abs=0.06)
        numbers.add(number)
    assert len(numbers) == len(found.ids)
    assert torch.equal(windows(tiny, tokenizer).ids, found.ids)  # the same every time


def test_trials_of_a_depth_stand_in_other_stretches(tiny, tokenizer):
    found = windows(tiny, tokenizer)
    first, second = (
        re.search(r"Line (\d+)", tokenizer.decode(found.ids[row].tolist()))[1] for row in (0, 1)
    )
    assert int(second) - int(first) > 50


def test_a_number_is_found_if_all_of_its_ids_are_the_likeliest():
    needles = Needles(TEXT, TRIALS, SIZE)
    window = torch.arange(len(DEPTHS) * TRIALS).repeat_interleave(3)
    greedy = torch.ones(len(window), dtype=torch.bool)
    greedy[4] = False  # of the second window, the first depth's other trial
    greedy[6:12] = False  # the second depth
    losses = torch.full((len(window),), 0.5)
    found = needles.result(TokenScores(window, window, losses, greedy, None), "words")
    assert [at.found for at in found.depths] == [1, 0, *[2] * 9]
    assert {at.trials for at in found.depths} == {TRIALS}
    assert all(at.log_likelihood == pytest.approx(-1.5) for at in found.depths)


def test_a_window_that_does_not_fit_is_refused(tiny, tokenizer):
    with pytest.raises(UsageError, match="no room"):
        windows(tiny, tokenizer, size=40)
    with pytest.raises(UsageError, match="shorter than a window"):
        windows(tiny, tokenizer, Text.of("a short text"))
    with pytest.raises(UsageError, match="2 to 1024"):
        windows(tiny, tokenizer, size=2048)
