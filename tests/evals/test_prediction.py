"""The prediction of a decode step: its launches are the ones that run, its order is plausible."""

from dataclasses import replace

import pytest

from qmix.evals import prediction
from qmix.planning import gpus


@pytest.mark.parametrize(("way", "count"), [("before", 9), ("now", 5), ("dependent", 5)])
def test_launches_a_layer(way, count):
    found = prediction.launches(prediction.FORMATS["NF4"], 132, way)
    assert len(found) == count
    assert sum(each.weights for each in found) == 4096 * (6144 + 4096) + 2 * 3 * 4096 * 14336


@pytest.mark.parametrize("card", prediction.DEVICES)
@pytest.mark.parametrize("kind", prediction.FORMATS)
def test_nothing_is_faster_than_reading(card, kind):
    speeds = [prediction.tokens_per_s(card, kind, way) for way in ("before", "now", "dependent")]
    assert speeds == sorted(speeds)
    assert speeds[0] / prediction.bound(card, kind) > 0.3
    assert speeds[-1] < prediction.bound(card, kind)


def test_the_bound_is_the_planner_s_bandwidth_over_the_bytes():
    read = 32 * sum(
        each.bytes for each in prediction.launches(prediction.FORMATS["NF4"], 132, "now")
    )
    seconds = (read + 2 * 32000 * 4096) / gpus.find("H100").read_bandwidth
    assert prediction.bound("H100", "NF4") == pytest.approx(1 / seconds)


def test_what_costs_time():
    """Uneven blocks, bytes that one block reads, and work behind the last arrival."""
    plain = prediction.Launch("down", bytes=10**8, weights=2 * 10**8)
    for change in ({"even": 0.5}, {"alone": 10**6}, {"finishes": 1}, {"bytes": 2 * 10**8}):
        slower = replace(plain, **change)
        assert seconds(slower) > seconds(plain)
    assert seconds(plain, "dependent") < seconds(plain)


def seconds(launch, way="now"):
    return prediction.seconds(launch, "H100", "NF4", way)


def test_the_command_says_what_it_is(capsys):
    assert prediction.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("A prediction; nothing here was measured.")
    assert "together, 5 launches" in said
