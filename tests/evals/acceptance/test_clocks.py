"""Clocks of a GPU while a step runs, from an nvidia-smi that is made up."""

import threading

import pytest

from qmix.evals.acceptance import clocks
from qmix.evals.acceptance.clocks import ClockLog
from tests.support.process import PATIENCE


def test_median_and_largest_since_the_last_call(monkeypatch):
    monkeypatch.setattr(clocks, "_INTERVAL_SECONDS", 0)
    given = iter(
        [(1000.0, 2.0, 300.0, 40.0), (1500.0, 2.0, 400.0, 50.0), (1980.0, 2.0, 350.0, 60.0)]
    )
    ended = threading.Event()

    def sample():
        found = next(given, None)
        if found is None:
            ended.set()
        return found

    log = ClockLog(sample)
    assert ended.wait(PATIENCE)
    assert log.taken() == {
        "sm_mhz": {"median": 1500.0, "largest": 1980.0},
        "memory_mhz": {"median": 2.0, "largest": 2.0},
        "watts": {"median": 350.0, "largest": 400.0},
        "celsius": {"median": 50.0, "largest": 60.0},
    }
    assert log.taken() == {}
    log.close()


def test_a_log_is_closed_while_it_waits(monkeypatch):
    monkeypatch.setattr(clocks, "_INTERVAL_SECONDS", PATIENCE)
    log = ClockLog(lambda: (1.0, 2.0, 3.0, 4.0))
    log.close()
    assert not log._thread.is_alive()


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo '1980, 2619, 350.25, 43'", (1980.0, 2619.0, 350.25, 43.0)),
        ("echo '1980, [N/A], 350, 43'", None),
        ("exit 9", None),
        ("true", None),
    ],
)
def test_what_nvidia_smi_says(script, found, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert clocks.query() == found


def test_without_nvidia_smi_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clocks.query() is None
