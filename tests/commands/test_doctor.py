"""qmix doctor: what it says of machines that are good, bad and absent."""

import json

import pytest

from qmix.commands import doctor
from qmix.planning import machine
from qmix.planning.machine import Gpu, HostMemory, Measured
from tests.support.process import CARD, GIB, qmix


@pytest.fixture
def bench_machine(monkeypatch, tmp_path):
    """A machine on which all is well; tests break one thing each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "memory", lambda: HostMemory(total=64 * GIB, available=60 * GIB))
    monkeypatch.setattr(machine, "gpus", lambda: (CARD,))
    monkeypatch.setattr(machine, "disk_free", lambda _: 500 * GIB)
    monkeypatch.setattr(machine, "processor", lambda: ("Test CPU", ("avx2", "fma")))
    monkeypatch.setattr(doctor, "_torch_sees_cuda", lambda: True)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


def found(what, tmp_path):
    (one,) = [f for f in doctor.examine(tmp_path).findings if f.what == what]
    return one


def test_a_good_machine_has_nothing_to_mend(bench_machine, tmp_path):
    report = doctor.examine(tmp_path)
    assert {one.state for one in report.findings} <= {"ok", "note"}
    assert "RTX 3090, 23.00 GiB free of 24.00 GiB, compute capability 8.6" in report.text()


@pytest.mark.parametrize(
    ("patch", "what", "state", "words"),
    [
        (
            ("machine", "memory", lambda: HostMemory(total=GIB, available=GIB)),
            "host memory",
            "fails",
            "3 GiB",
        ),
        (
            (
                "machine",
                "memory",
                lambda: HostMemory(total=8 * GIB, available=8 * GIB, limit="cgroup"),
            ),
            "host memory",
            "note",
            "control group",
        ),
        (("machine", "gpus", lambda: ()), "GPU", "note", "CPU"),
        (("doctor", "_torch_sees_cuda", lambda: False), "CUDA", "fails", "torch built for CUDA"),
        (("machine", "processor", lambda: ("Old", ())), "processor", "slow", "AVX2"),
        (("doctor", "_version", lambda _: None), "torch", "fails", "missing"),
        (("doctor", "_version", lambda _: "2.9.1"), "torch", "note", "2.10"),
        (("doctor", "_version", lambda _: "3.0"), "torch", "note", "Tested"),
        (("doctor.shutil", "which", lambda _: None), "compiler", "slow", "g++"),
        (("machine", "disk_free", lambda _: GIB), "disk", "note", "24 GB"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(bench_machine, tmp_path, patch, what, state, words):
    place, name, value = patch
    owner = {"machine": machine, "doctor": doctor, "doctor.shutil": doctor.shutil}[place]
    bench_machine.setattr(owner, name, value)
    one = found(what, tmp_path)
    assert one.state == state
    assert one.remedy
    assert words in f"{one.found} {one.remedy}"


def test_an_old_card_is_slow(bench_machine, tmp_path):
    old = Gpu(name="Tesla T4", total=15 * GIB, free=15 * GIB, driver="550", capability=(7, 5))
    bench_machine.setattr(machine, "gpus", lambda: (old,))
    assert found("GPU", tmp_path).state == "slow"


def test_a_damaged_file_of_measurements_is_told(bench_machine, tmp_path):
    path = machine.measurements_path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    one = found("measurements", tmp_path)
    assert str(path) in one.found
    assert "ignored" in one.found


def test_measurements_are_saved_and_found_again(bench_machine, tmp_path):
    measured = Measured(
        key=machine.key(CARD.name), host_read=38e9, date="2026-01-02T03:04:05+00:00"
    )
    bench_machine.setattr(doctor, "_measure", lambda key, *_, **__: measured)
    report = doctor.examine(tmp_path, measure=True)
    assert report.saved == machine.measurements_path()
    assert doctor.examine(tmp_path).measured == measured
    assert "38 GB/s" in report.text()


def test_a_cache_that_cannot_be_written_is_told(bench_machine, tmp_path):
    (tmp_path / "qmix").write_text("in the way")
    bench_machine.setattr(
        doctor, "_measure", lambda key, *_, **__: Measured(key=key, host_read=1e9)
    )
    report = doctor.examine(tmp_path, measure=True)
    assert report.saved is None
    assert "XDG_CACHE_HOME" in report.findings[-1].remedy


def test_measuring_gives_plausible_figures(tmp_path):
    import torch

    from qmix.evals.timing import bandwidth

    assert 1e8 < bandwidth.read_bandwidth(torch.device("cpu"), 64 << 20) < 1e13
    assert 1e6 < bandwidth.disk_bandwidth(tmp_path, 64 << 20) < 1e12
    assert list(tmp_path.iterdir()) == []


def test_the_command():
    result = qmix("doctor", "--json")
    assert result.returncode == 0, result.stderr
    findings = json.loads(result.stdout)["findings"]
    assert {"qmix", "python", "torch", "processor", "host memory", "disk", "GPU"} <= {
        finding["what"] for finding in findings
    }
