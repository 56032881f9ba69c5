"""Work beside the next layer: in order, to its end, with its errors."""

import threading

import pytest

from qmix.quantize.calibrated.background import Background

both = pytest.mark.parametrize("beside", [True, False])


def fail():
    raise ValueError("no room")


def test_a_piece_goes_on_beside_its_caller_who_waits_for_it_before_the_next():
    caller_goes_on, done = threading.Event(), []
    with Background(beside=True) as background:
        background.run(lambda: caller_goes_on.wait() and done.append(1))
        assert done == []
        caller_goes_on.set()
        background.run(lambda: done.append(2))
        background.wait()
    assert done == [1, 2]


def test_not_beside_a_piece_ends_before_its_caller_goes_on():
    done = []
    with Background(beside=False) as background:
        background.run(lambda: done.append(threading.current_thread()))
        assert done == [threading.current_thread()]


@both
def test_an_error_reaches_the_caller_before_the_next_piece_begins(beside):
    begun = []

    def caller():
        with Background(beside) as background:
            background.run(fail)
            background.run(lambda: begun.append(1))

    with pytest.raises(ValueError, match="no room"):
        caller()
    assert begun == []


def test_an_error_is_raised_once():
    with Background(beside=True) as background:
        background.run(fail)
        with pytest.raises(ValueError, match="no room"):
            background.wait()
        background.wait()


@both
def test_the_piece_at_work_ends_if_its_caller_fails(beside):
    done = []

    def caller():
        with Background(beside) as background:
            background.run(lambda: done.append(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caller()
    assert done == [1]
