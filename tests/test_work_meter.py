"""The end of work is foreseen from what each kind has taken, not from how many pieces are done."""

import pytest

from qmix.work_meter import WorkMeter


class Work:
    """Pieces of known work, on a clock that only they move."""

    def __init__(self, expected, seconds):
        self.now, self.seconds, self.reports = 100.0, seconds, []
        self.meter = WorkMeter(expected, lambda *at: self.reports.append(at), lambda: self.now)

    def do(self, kind, amount):
        with self.meter.doing(kind, kind, amount) as tell:
            for part in range(10):
                self.now += amount * self.seconds[kind] / 10
                tell((part + 1) / 10)

    def first_told(self, share=0.05):
        """(seconds so far, seconds in all) of the first report from this share on."""
        return next((done, total) for _, done, total in self.reports if done >= share * total)


@pytest.mark.parametrize("factor", [0.2, 1, 30])
def test_kinds_whose_ratio_is_expected_are_foreseen_from_the_first(factor):
    expected = {"run": 0.001, "round": 2.0}
    work = Work(expected, {kind: factor * rate for kind, rate in expected.items()})
    work.meter.plan({"run": 9000, "round": 100})
    for _ in range(10):
        work.do("run", 900)
        work.do("round", 10)
    end = work.reports[-1][1]
    assert work.first_told()[1] == pytest.approx(end)
    assert work.reports[-1][1] == pytest.approx(work.reports[-1][2])
    assert dict(work.meter.left) == {"run": 0, "round": 0}


def test_a_kind_that_turns_out_slow_is_foreseen_once_it_is_measured():
    work = Work({"run": 1.0, "round": 1.0}, {"run": 0.1, "round": 20.0})
    work.meter.plan({"run": 100, "round": 100})
    work.do("run", 5)
    work.do("round", 5)
    _, done, total = work.reports[-1]
    assert total == pytest.approx(100 * 0.1 + 100 * 20.0)
    assert done == pytest.approx(5 * 0.1 + 5 * 20.0)


def test_time_between_the_pieces_counts_as_much_again():
    work = Work({"run": 1.0}, {"run": 1.0})
    work.meter.plan({"run": 10})
    work.do("run", 1)
    work.now += 1  # something that nobody planned
    work.do("run", 1)
    assert work.reports[-1][2] == pytest.approx(3 + 8 * 1.5)


def test_what_is_dropped_is_not_waited_for():
    work = Work({"run": 1.0}, {"run": 2.0})
    work.meter.plan({"run": 10})
    work.meter.drop({"run": 6})
    work.do("run", 2)
    assert work.reports[-1][2] == pytest.approx(8)


def test_each_counts_what_is_done_with_an_item():
    work = Work({"run": 1.0}, {})
    work.meter.plan({"run": 6})
    for item in work.meter.each("running", "run", [1, 2, 3], lambda item: item):
        work.now += 5 * item
    assert work.reports[-1] == ("running", 30, 30)


def test_nothing_planned_is_no_division_by_zero():
    work = Work({"run": 1.0}, {"run": 0.0})
    work.do("run", 0)
    assert work.reports[-1] == ("run", 0, 0)
