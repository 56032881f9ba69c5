"""Times of passes by their rows: what was measured, and what is estimated from it."""

import pytest

from qmix.generation.pass_times import PassTimes


def test_sizes_that_were_measured_are_their_medians_and_others_lie_between():
    times = PassTimes()
    for seconds in (4.0, 9.0, 5.0):
        times.took(3, seconds)
    assert (times.measured(3), times.measured(4)) == (3, 0)
    assert times.seconds(3) == 5.0
    assert 5.0 < times.seconds(8) < times.seconds(16) < 3.5 * 5.0
    for _ in range(2):
        times.took(16, 7.0)
    assert times.seconds(16) == 7.0
    assert 5.0 < times.seconds(8) < 7.0
    assert times.seconds(2) < 5.0


def test_an_estimate_follows_what_is_measured_after_it():
    times = PassTimes()
    times.took(1, 1.0)
    before = times.seconds(8)
    for _ in range(20):
        times.took(1, 2.0)
    assert times.seconds(8) == pytest.approx(2 * before)


def test_a_larger_pass_is_never_estimated_to_be_shorter_than_the_least():
    times = PassTimes()
    times.took(1, 2.0)
    times.took(8, 1.0)
    assert times.seconds(16) == 2.0
