"""Which path serves misses: by measured rates, with hysteresis."""

import random

import pytest

from qmix.experts.miss_path import MissPathSelector


def clocked(path, interconnect, cpu, tokens, missed=10**8):
    """A clock that gives each way its rate: what `tokens` tokens take, and the ways they took."""
    ways, clock = [], 0.0
    for token in range(tokens):
        way = path.choose()
        rate = cpu(token) if way == "cpu" else interconnect
        seconds = missed / rate
        path.observe(way, missed, seconds)
        ways.append(way)
        clock += seconds
    return ways, clock


def test_the_interconnect_serves_misses_until_both_are_measured():
    path = MissPathSelector()
    assert clocked(path, 25e9, lambda t: 60e9, 10)[0] == ["zero-copy"] * 10
    path.observe("cpu", 10**9, 10**9 / 60e9)
    assert set(clocked(path, 25e9, lambda t: 60e9, 10)[0]) == {"cpu"}
    assert path.switches == 1


def test_a_cpu_that_collapses_in_service_is_left_and_not_taken_again():
    path = MissPathSelector(rates={"zero-copy": 25e9, "cpu": 60e9})
    ways, clock = clocked(path, 25e9, lambda t: 60e9 if t < 5 else 2e9, 40)
    assert ways[:5] == ["cpu"] * 5
    assert "cpu" not in ways[10:]
    assert path.switches == 2
    assert clock < 40 * 10**8 / 25e9 + 4 * 10**8 / 2e9  # some slow tokens, and no more


@pytest.mark.parametrize("noise", [0.05, 0.12])
def test_rates_that_wander_do_not_make_it_swing(noise):
    """Around the ratio at which it enters, and around that at which it leaves."""
    for ratio in (1.75, 2.0, 1.5):
        path = MissPathSelector(rates={"zero-copy": 25e9, "cpu": ratio * 25e9})
        chance = random.Random(1)
        clocked(
            path, 25e9, lambda t, r=ratio, c=chance: r * 25e9 * (1 + c.uniform(-noise, noise)), 300
        )
        assert path.switches <= 2


def test_nothing_measured_is_no_measurement():
    path = MissPathSelector()
    path.observe("cpu", 0, 1.0)
    path.observe("cpu", 5, 0.0)
    assert path.rates == {}
