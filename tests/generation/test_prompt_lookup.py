"""What followed the newest ids where they stood before."""

from hypothesis import given
from hypothesis import strategies as st

from qmix.generation.prompt_lookup import PromptLookup

TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=4)


def looked_up(*texts):
    lookup = PromptLookup()
    for text in texts:
        lookup.begin(text)
    return lookup


@given(texts=TEXTS, put=st.lists(st.integers(0, 3), max_size=30))
def test_a_match_is_one_and_every_repeated_pair_has_one(texts, put):
    lookup = looked_up(*texts)
    for index in put:
        lookup.put(index)
    newest = [*texts[-1], *put]
    pair = newest[-2:]
    places = [
        (text, end)
        for text in [*texts[:-1], newest]
        for end in range(2, len(text))
        if text[end - 2 : end] == pair and len(pair) == 2
    ]
    assert (lookup.matched > 0) == bool(places)
    if lookup.matched:
        draft = lookup.draft(1)
        ends = [
            text[end]
            for text, end in places
            if text[max(end - lookup.matched, 0) : end] == newest[-lookup.matched :]
        ]
        assert draft == [lookup.next_id]
        assert draft[0] in ends
        assert lookup.matched >= 2


def test_the_longest_match_is_followed_and_of_equals_the_newest():
    assert looked_up([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]).draft(1) == [9]
    assert looked_up([2, 3, 9, 2, 3, 8, 2, 3]).draft(1) == [8]


def test_a_match_is_followed_as_long_as_it_holds():
    lookup = looked_up([5, 6, 7, 8, 9, 5, 6])
    assert (lookup.matched, lookup.draft(3)) == (2, [7, 8, 9])
    lookup.put(7)
    assert (lookup.matched, lookup.draft(2)) == (3, [8, 9])
    lookup.put(1)
    assert (lookup.matched, lookup.draft(4), lookup.next_id) == (0, [], None)


def test_a_text_that_repeats_goes_on_repeating():
    assert looked_up([1, 2, 3, 1, 2, 3]).draft(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert looked_up([4, 4, 4]).draft(3) == [4, 4, 4]


def test_earlier_texts_are_looked_up_too_but_never_across_their_ends():
    lookup = looked_up([1, 2, 3, 4, 5], [9, 2, 3])
    assert lookup.draft(5) == [4, 5]
    assert looked_up([1, 2], [1, 2]).matched == 0  # nothing followed
    assert looked_up([7, 1], [2, 8, 7, 1]).draft(4) == []


def test_a_text_that_goes_on_is_not_read_again():
    lookup = looked_up([1, 2, 3, 4])
    lookup.begin([1, 2, 3, 4, 9, 2, 3])
    assert len(lookup._ids) == 1 + 7
    assert lookup.draft(2) == [4, 9]
    lookup.begin([1, 2, 3, 4, 9, 5])  # another end: the context of the new ids is kept
    assert lookup.matched == 0
    lookup.put(1)
    lookup.put(2)
    assert lookup.draft(1) == [3]


def test_old_texts_are_forgotten():
    lookup = PromptLookup(most_ids=40)
    for text in range(50):
        lookup.begin([text, *range(100, 119)])
        assert len(lookup._ids) <= 2 * 40
    lookup.put(100)
    lookup.put(101)
    assert lookup.draft(2) == [102, 103]
