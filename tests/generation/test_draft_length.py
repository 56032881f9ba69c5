"""How many ids are drafted: by acceptance and time, as they are measured."""

import pytest

from qmix.generation.draft_length import DraftLength


def timed(single=1.0, sixteen=3.5):
    """After some single steps and passes of other sizes, whose times lie on a line."""
    length = DraftLength()
    for rows in (1, 1, 1, 2, 4, 8, 12, 16):
        length.times.took(rows, single + (sixteen - single) * (rows - 1) / 15)
    return length


def observed(length, accepted, *, matched=5, times=100):
    for index in range(times):
        length.observe(matched + index % 20, accepted=accepted)
    return length


def test_nothing_is_drafted_before_single_steps_have_been_timed():
    length = observed(DraftLength(), accepted=True)
    for _ in range(3):
        assert length.best(8, 15) == 0
        length.times.took(1, 1.0)
    assert length.best(8, 15) == 15


def test_long_drafts_are_made_where_ids_are_accepted_and_none_where_they_are_not():
    assert observed(timed(), accepted=True).best(8, 15) == 15
    assert observed(timed(), accepted=False).best(8, 15) == 0


def test_drafts_end_where_they_do_not_pay_and_begin_again_where_the_text_repeats():
    length = observed(timed(), accepted=True)
    wrong = 0
    while length.best(8, 15):
        length.observe(8, accepted=False)
        wrong += 1
        assert wrong < 40
    right = 0
    while not length.best(8, 15):
        length.observe(8, accepted=True)
        right += 1
        assert right < 40


@pytest.mark.parametrize(("sixteen", "drafted"), [(3.5, 11), (16.0, 0), (1.0, 15)])
def test_what_a_pass_costs_decides(sixteen, drafted):
    length = observed(timed(sixteen=sixteen), accepted=True)
    assert length.best(4, 15) == drafted


def test_of_two_sizes_the_faster_one_is_taken():
    length = observed(timed(), accepted=True)
    for _ in range(5):
        length.times.took(16, 9.0)  # more rows than the kernels take one by one
        length.times.took(12, 9.0)
    assert length.best(8, 15) == 7
    assert length.best(8, 6) == 3
    assert length.best(8, 0) == 0


def test_a_size_that_was_never_timed_is_estimated_from_those_that_were():
    length = DraftLength()
    for _ in range(3):
        length.times.took(1, 2.0)
    assert length.times.seconds(16) == pytest.approx(7.0)
    assert 2.0 < length.times.seconds(4) < length.times.seconds(8) < 7.0
    length.times.took(16, 4.0)
    assert length.times.seconds(16) == 4.0
    assert 2.0 < length.times.seconds(8) < 4.0


def test_a_time_that_is_long_ago_is_measured_anew():
    length = observed(timed(), accepted=True)
    for _ in range(300):
        length.times.took(16, 3.5)
    assert length.best(8, 15) == 0  # a single step first
    for _ in range(3):
        length.times.took(1, 1.0)
    assert length.best(8, 15) == 15


def test_a_hiccup_does_not_decide():
    length = observed(timed(), accepted=True)
    for seconds in (3.4, 90.0, 3.5):
        length.times.took(16, seconds)
    assert length.best(8, 15) == 15
