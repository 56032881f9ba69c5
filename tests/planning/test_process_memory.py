"""The resident memory of this process: plausible where there is /proc, None where there is none."""

import sys

import pytest

from qmix.planning import process_memory


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_is_at_least_what_is_resident_now():
    ballast = bytearray(8 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    resident, peak = process_memory.resident_bytes(), process_memory.peak_resident_bytes()
    assert len(ballast) < resident <= peak


@pytest.mark.parametrize("content", [None, "Name: python\n"])
def test_a_system_that_does_not_tell_gives_none(monkeypatch, tmp_path, content):
    status = tmp_path / "status"
    if content is not None:
        status.write_text(content)
    monkeypatch.setattr(process_memory, "_STATUS", status)
    assert process_memory.resident_bytes() is None
    assert process_memory.peak_resident_bytes() is None
