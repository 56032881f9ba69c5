"""The search, with a device and a clock that are made up: a candidate is a tuple of two numbers."""

import pytest

from qmix.tuning.search import LARGEST_DIFFERENCE, DeviceLostError, Outcome, Search


class Device:
    """A device on which (2, 3) is fastest.

    Attributes:
        odd: what a candidate does in place of running: raises, or gives an outcome.
        tried: candidates in the order of their trials.
    """

    def __init__(self, odd=None, seconds=1.0):
        self.now, self.seconds, self.odd = 50.0, seconds, odd or {}
        self.tried, self.prepared = [], []

    def clock(self):
        return self.now

    def prepare(self, candidates):
        self.prepared.append(list(candidates))

    def measure(self, candidate):
        self.tried.append(candidate)
        self.now += self.seconds
        odd = self.odd.get(candidate)
        if isinstance(odd, BaseException):
            raise odd
        if odd is not None:
            return odd
        first, second = candidate
        return Outcome(100.0 + 10 * abs(first - 2) + 5 * abs(second - 3), 0.001)


AXES = (
    lambda found: [(first, found[1]) for first in (0, 1, 2, 3)],
    lambda found: [(found[0], second) for second in (0, 1, 2, 3)],
)


def search(device, seconds=20.0, axes=AXES, **options):
    return Search([(0, 0), (9, 9)], axes, device, seconds=seconds, clock=device.clock, **options)


def test_the_fastest_along_each_axis_is_found_and_confirmed():
    device = Device()
    found = search(device)
    found.run()
    assert found.best == (2, 3)
    assert found.gain == pytest.approx(1 - 100 / 135)
    assert device.tried[0] == (0, 0)
    assert device.tried[-2:] == [(0, 0), (2, 3)]
    assert len(device.tried) == 1 + 3 + 3 + 2  # none twice but to confirm
    assert device.prepared == [[(1, 0), (2, 0), (3, 0)], [(2, 1), (2, 2), (2, 3)]]


@pytest.mark.parametrize(
    "odd",
    [
        Outcome(1.0, 2 * LARGEST_DIFFERENCE),
        Outcome(1.0, float("nan")),
        Outcome(1.0, float("inf")),
        Outcome(0.0, 0.0),
        Outcome(float("nan"), 0.0),
        RuntimeError("out of resource: shared memory"),
        AssertionError("a shape"),
    ],
    ids=repr,
)
def test_a_candidate_that_miscomputes_or_raises_never_wins(odd):
    device = Device({(2, 0): odd, (1, 3): odd})
    found = search(device)
    found.run()
    assert found.best == (1, 2) or found.best == (3, 3)
    assert set(found.rejected) & {(2, 0), (1, 3)}
    assert not set(found.outcomes) & {(2, 0), (1, 3)}
    assert all(found.rejected.values())


@pytest.mark.parametrize("odd", [RuntimeError("no memory"), Outcome(1.0, 0.5)])
def test_a_start_that_fails_is_replaced_by_the_next(odd):
    device = Device({(0, 0): odd})
    found = search(device)
    found.run()
    assert (found.start, found.best) == ((9, 9), (2, 3))
    device = Device({(0, 0): odd, (9, 9): odd})
    found = search(device)
    found.run()
    assert (found.best, found.gain, device.tried) == ((0, 0), 0.0, [(0, 0), (9, 9)])


def test_no_trial_begins_that_would_end_too_late():
    for seconds in (1.0, 3.0, 7.5, 8.0):
        device = Device(seconds=2.0)
        found = search(device, seconds=seconds)
        found.run()
        assert device.now - 50.0 <= max(seconds, 2.0)
        assert found.best in {(0, 0), (1, 0), (2, 0)}


def test_preparing_counts_too():
    class Compiling(Device):
        def prepare(self, candidates):
            super().prepare(candidates)
            self.now += 4.0

    device = Compiling()
    found = search(device, seconds=12.0)
    found.run()
    assert len(device.prepared) == 1
    assert found.best == (2, 0)
    assert device.now - 50.0 <= 12.0


def test_what_is_hardly_faster_is_not_kept():
    """One per cent is what two runs of the same differ by."""
    device = Device({(1, 0): Outcome(134.5, 0.0), (2, 0): Outcome(140.0, 0.0)})
    found = search(device, axes=[lambda found: [(1, 0), (2, 0)]])
    found.run()
    assert found.best == (0, 0)


def test_a_gain_that_is_not_there_again_is_not_kept():
    class Warming(Device):
        def measure(self, candidate):
            outcome = super().measure(candidate)
            slow = self.tried.count((0, 0)) == 1 and candidate == (0, 0)
            return Outcome(200.0 if slow else 100.0, outcome.difference)

    found = search(Warming())
    found.run()
    assert found.best == (0, 0)


def test_ctrl_c_leaves_what_was_found_so_far():
    device = Device({(3, 0): KeyboardInterrupt()})
    found = search(device)
    with pytest.raises(KeyboardInterrupt):
        found.run()
    assert found.best == (2, 0)
    assert found.gain > 0


def test_a_lost_device_ends_the_search_and_names_the_candidate():
    lost = DeviceLostError()
    lost.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    device = Device({(2, 1): lost})
    found = search(device)
    with pytest.raises(DeviceLostError):
        found.run()
    assert found.best == (2, 0)
    assert "illegal memory access" in found.rejected[2, 1]


def test_each_trial_is_told():
    told, device = [], Device()
    search(device, on_trial=told.append).run()
    assert told == [float(index) for index in range(len(device.tried))]
