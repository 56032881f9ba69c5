"""qmix doctor: what it says about machines that are good, bad and absent."""

import json
from dataclasses import replace

import pytest

from qmix.commands import diagnosis, doctor
from qmix.commands.diagnosis import Facts, diagnose
from qmix.errors import UnsupportedError
from qmix.kernels.choice import Verdict
from qmix.kernels.cpu import build
from qmix.kernels.cpu.library import library
from qmix.planning import machine
from qmix.planning.machine import Gpu, HostMemory, Measured
from tests.support.process import CARD, GIB, qmix

OLD_GPU = Gpu(name="Tesla T4", total=15 * GIB, free=15 * GIB, driver="550", capability=(7, 5))


@pytest.fixture
def good(tmp_path):
    """The facts of a machine on which all is well; tests change one thing each."""
    return Facts(
        folder=tmp_path,
        versions={"torch": "2.13.0+cu130", **dict.fromkeys(diagnosis.PACKAGES, "1.0")},
        processor="Test CPU",
        instruction_sets=("avx2", "portable"),
        cores=8,
        compiler="/usr/bin/c++",
        memory=HostMemory(total=64 * GIB, available=60 * GIB),
        disk_free=500 * GIB,
        gpus=(CARD,),
        torch_sees_cuda=True,
    )


@pytest.fixture
def on_good_machine(monkeypatch, tmp_path, good):
    """`examine` finds the good machine, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Facts, "gather", lambda folder: good)
    return monkeypatch


def with_torch(version):
    return {"versions": {"torch": version, **dict.fromkeys(diagnosis.PACKAGES, "1.0")}}


def test_a_good_machine_has_nothing_to_mend(good):
    findings = diagnose(good)
    assert {finding.state for finding in findings} == {"ok"}
    text = doctor.DoctorReport(findings=findings).text()
    assert "RTX 3090, 23.00 GiB free of 24.00 GiB, compute capability 8.6" in text
    assert "->" not in text


@pytest.mark.parametrize(
    ("change", "what", "state", "words"),
    [
        ({"memory": HostMemory(total=GIB, available=GIB)}, "host memory", "fails", "3 GiB"),
        (
            {"memory": HostMemory(total=8 * GIB, available=8 * GIB, limit="cgroup")},
            "host memory",
            "note",
            "control group",
        ),
        ({"gpus": ()}, "GPU", "note", "CPU"),
        ({"gpus": (OLD_GPU,)}, "GPU", "slow", "8.0"),
        ({"torch_sees_cuda": False}, "CUDA", "fails", "torch built for CUDA"),
        ({"instruction_sets": ("portable",)}, "processor", "slow", "AVX2"),
        (with_torch(None), "torch", "fails", "missing"),
        (with_torch("2.9.1"), "torch", "note", "2.10"),
        (with_torch("3.0"), "torch", "note", "Tested"),
        ({"compiler": None}, "compiler", "slow", "g++"),
        ({"nodes": (0, 1)}, "NUMA", "note", "2 nodes of memory"),
        ({"nodes": (0, 1)}, "NUMA", "note", "numactl --interleave=all"),
        ({"disk_free": GIB}, "disk", "note", "24 GB"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_with_its_remedy(monkeypatch, good, change, what, state, words):
    monkeypatch.setattr(diagnosis.platform, "machine", lambda: "x86_64")
    (finding,) = [f for f in diagnose(replace(good, **change)) if f.what == what]
    assert finding.state == state
    assert finding.remedy
    assert words in f"{finding.found} {finding.remedy}"


def test_each_gpu_has_its_line(good):
    found = [f.found for f in diagnose(replace(good, gpus=(CARD, OLD_GPU))) if f.what == "GPU"]
    assert [text.split(",")[0] for text in found] == ["NVIDIA GeForce RTX 3090", "Tesla T4"]


def test_each_device_has_its_backend_and_the_reason(good):
    refusal = UnsupportedError("too old", where="T4", found="7.5", remedy="Install bitsandbytes.")
    verdicts = (
        Verdict("cpu", "qmix"),
        Verdict("cuda:0, T4", "torch", refusal),
        Verdict("cuda:1, T4", None, refusal),
    )
    found = [f for f in diagnose(replace(good, backends=verdicts)) if f.what == "backend"]
    assert [f.state for f in found] == ["ok", "slow", "fails"]
    assert found[1].found == "cuda:0, T4: torch, because T4: too old; found 7.5"
    assert found[1].remedy == "Install bitsandbytes."
    assert found[2].found.startswith("cuda:1, T4: none, because")


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("QMIX_BACKEND", "cuda", "backend"),
        ("QMIX_CPU_PATH", "sse2", "backend"),
        ("QMIX_CPU_PATH", "sse2", "processor"),
        ("QMIX_CPU_PATH", "torch", "processor"),
        ("QMIX_TUNE", "often", "tuning"),
    ],
)
def test_a_variable_that_ends_a_load_is_a_finding_and_not_the_end(
    monkeypatch, tmp_path, variable, value, what
):
    monkeypatch.setattr(machine, "gpus", lambda: (CARD,))
    with monkeypatch.context() as patched:
        patched.setenv(variable, value)
        library.cache_clear()
        findings = doctor.examine(tmp_path).findings
    library.cache_clear()
    library()  # before a test that names a compiler which is none
    assert {"qmix", "processor", "backend", "host memory"} <= {f.what for f in findings}
    found = next(f for f in findings if f.what == what)
    assert found.state == ("slow" if what == "processor" else "fails")
    assert variable in f"{found.found} {found.remedy}"
    assert value in found.found
    assert "AVX2" not in str(found.remedy)


def test_an_instruction_set_that_the_system_refuses_is_named(monkeypatch, good):
    monkeypatch.delenv("QMIX_CPU_PATH", raising=False)
    monkeypatch.setattr(diagnosis.instruction_sets, "refused", lambda: ("amx",))
    found = next(f for f in diagnose(good) if f.what == "processor")
    assert found.found.endswith(
        "4-bit kernels for avx2 (the best of it and portable; the system refuses amx its registers)"
    )


def compiler_found(folder):
    return Facts.gather(folder).compiler


def test_the_compilers_are_those_that_the_kernels_are_compiled_with():
    assert diagnosis.COMPILERS == build.COMPILERS


def test_a_compiler_that_is_named_is_the_one_reported(monkeypatch, tmp_path):
    mine = tmp_path / "mycc"
    mine.write_text("#!/bin/sh\n")
    mine.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_found(tmp_path) is None
    monkeypatch.setenv("CXX", "mycc -stdlib=libc++")
    assert compiler_found(tmp_path) == "mycc -stdlib=libc++"
    assert build._compiler() == ["mycc", "-stdlib=libc++"]


def test_a_named_compiler_that_is_missing_is_not_replaced_by_another(monkeypatch, tmp_path, good):
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiler_found(tmp_path) == str(tmp_path / "c++")
    monkeypatch.setenv("CXX", "nowhere-c++")
    assert compiler_found(tmp_path) is None
    (finding,) = [f for f in diagnose(replace(good, compiler=None)) if f.what == "compiler"]
    assert "$CXX" in finding.remedy


def test_a_missing_package_is_listed(good):
    versions = {**good.versions, "flash_attn": None}
    findings = {f.what: f for f in diagnose(replace(good, versions=versions))}
    assert findings["optional"].found == "not installed: flash_attn"
    assert "flash_attn" not in findings["packages"].found


def test_a_damaged_file_of_measurements_is_noted(on_good_machine, tmp_path):
    path = machine.measurements_path()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    last = doctor.examine(tmp_path).findings[-1]
    assert last.what == "measurements"
    assert str(path) in last.found
    assert "ignored" in last.found


def test_measurements_are_saved_and_found_again(on_good_machine, tmp_path):
    measured = Measured(
        key=machine.key(CARD.name), host_read=38e9, date="2026-01-02T03:04:05+00:00"
    )
    on_good_machine.setattr(doctor, "_measure", lambda key, *_, **__: measured)
    report = doctor.examine(tmp_path, measure=True)
    assert report.saved == machine.measurements_path()
    assert doctor.examine(tmp_path).measured == measured
    assert "38 GB/s" in report.text()


def test_a_cache_that_cannot_be_written_is_noted(on_good_machine, tmp_path):
    (tmp_path / "qmix").write_text("in the way")
    on_good_machine.setattr(
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
