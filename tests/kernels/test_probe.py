"""Whether a GPU takes our kernels: refusals, misses and failures, without a GPU."""

import sys
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from qmix import kernels
from qmix.errors import ResourceError, UnsupportedError
from qmix.kernels.gpu import card as cards
from qmix.kernels.gpu import probe, self_check
from qmix.kernels.gpu.card import Card
from qmix.kernels.trial import Comparison
from qmix.weights.scheme import Scheme
from tests.support.interpreter import run_apart
from tests.support.soak import both

CUDA = torch.device("cuda:0")
NF4, INT4 = Scheme(kind="nf4"), Scheme(kind="int4")
GOOD = {
    "name": "NVIDIA H100",
    "capability": (9, 0),
    "driver": (13, 0),
    "triton": "3.7.1",
    "assembler": (12, 9),
    "compiler": "/usr/bin/gcc",
}


@both
def test_the_self_check_in_the_interpreter(soak):
    assert "skipped" not in run_apart("probe", interpreted=True, soak=soak)


@pytest.mark.gpu
def test_the_kernels_of_this_gpu_are_right():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert probe.why_not(torch.device("cuda"), dtype, (NF4, INT4)) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hip": "6.4"}, ["ROCm 6.4", "torch built for CUDA", "bitsandbytes"]),
        ({"capability": (7, 5)}, ["8.0 or newer", "found 7.5", "bitsandbytes"]),
        (
            {"triton": None, "trouble": "ModuleNotFoundError: No module named 'triton'"},
            ["Triton cannot be imported", "No module named", "pip install triton"],
        ),
        ({"triton": "3.2.0"}, ["3.6 or newer", "found 3.2.0", "newer torch"]),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_with_reason_and_remedy(change, words):
    said = str(Card(**{**GOOD, **change}).refusal())
    assert said.startswith("NVIDIA H100: ")
    assert all(word in said for word in words), said


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0+git1", "3.10.0a0", "4.0"])
def test_a_good_card_is_tried(version):
    assert Card(**{**GOOD, "triton": version}).refusal() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"compiler": None}, ["C compiler", "gcc", "$CC"]),
        ({"python_h": False}, ["Python.h", "python3-dev"]),
        ({"driver": (12, 4)}, ["driver is too old", "CUDA 12.4", "newer driver"]),
        ({}, ["CalledProcessError", "Triton 3.7.1", "qmix doctor"]),
    ],
    ids=str,
)
def test_a_failure_is_explained_by_what_is_missing(change, words):
    class CalledProcessError(Exception):
        pass

    said = str(Card(**{**GOOD, **change}).explained(CalledProcessError("exit status 1\nmore")))
    assert all(word in said for word in words), said
    assert "more" not in said


def test_what_this_python_has_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cards._compiler() is None
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert cards._compiler() == str(tmp_path / "gcc")
    monkeypatch.setenv("CC", "nowhere-cc")
    assert cards._compiler() is None
    assert cards._triton()[0] == sys.modules["triton"].__version__
    monkeypatch.setitem(sys.modules, "triton", None)
    version, trouble = cards._triton()
    assert version is None
    assert "triton" in trouble


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as the probe sees it; returns what sets the result of each trial, and the trials."""
    trials, outcome = [], {}

    def first_miss(device, dtype, scheme):
        trials.append((device, dtype, scheme))
        result = outcome.get(scheme)
        if isinstance(result, Exception):
            raise result
        return result

    probe._failure.cache_clear()
    probe.usable.cache_clear()
    monkeypatch.setattr(probe, "card", lambda device: Card(**{**GOOD, **outcome.get("card", {})}))
    monkeypatch.setattr(probe, "_answers", lambda device: outcome.get("answers", True))
    monkeypatch.setattr(self_check, "first_miss", first_miss)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield outcome, trials
    probe._failure.cache_clear()
    probe.usable.cache_clear()


def test_the_kernels_are_tried_once_a_device_dtype_and_kind(gpu):
    _, trials = gpu
    for _ in range(2):
        assert probe.why_not(torch.device("cuda"), torch.bfloat16, (NF4, INT4)) is None
        assert probe.why_not(CUDA, torch.bfloat16, (NF4,)) is None
    assert trials == [(CUDA, torch.bfloat16, scheme) for scheme in (None, NF4, INT4)]


def test_a_refused_card_is_not_tried(gpu):
    outcome, trials = gpu
    outcome["card"] = {"capability": (7, 5)}
    assert "too old" in str(probe.why_not(CUDA, torch.float16, (NF4,)))
    assert trials == []


def test_wrong_results_name_the_kernel_and_the_versions(gpu):
    outcome, _ = gpu
    outcome[INT4] = Comparison("matmul of 1 tokens", torch.zeros(3), torch.ones(3))
    said = str(probe.why_not(CUDA, torch.float16, (NF4, INT4)))
    assert "wrong results: matmul of 1 tokens" in said
    assert "100.0%" in said
    assert "Triton 3.7.1" in said
    assert probe.why_not(CUDA, torch.float16, (NF4,)) is None


def test_a_launch_that_raises_is_a_reason(gpu):
    outcome, _ = gpu
    outcome[None] = RuntimeError("CUDA error: no kernel image is available")
    error = probe.why_not(CUDA, torch.float16)
    assert isinstance(error, UnsupportedError)
    assert "no kernel image" in str(error)


def test_a_device_that_died_of_the_trial_is_an_error(gpu):
    outcome, _ = gpu
    outcome[None], outcome["answers"] = RuntimeError("CUDA error: illegal address"), False
    with pytest.raises(ResourceError, match=r"illegal address.*QMIX_BACKEND=torch"):
        probe.why_not(CUDA, torch.float16)


class OnGpu:
    """A tensor that says it lies on a GPU."""

    is_cuda, device, dtype, requires_grad = True, CUDA, torch.float16, False


def test_a_model_that_was_moved_to_a_refused_card_is_computed_by_torch_with_one_warning(gpu):
    outcome, _ = gpu
    assert kernels._fused(OnGpu(), OnGpu())
    probe.usable.cache_clear()
    outcome["card"] = {"hip": "6.4"}
    with pytest.warns(RuntimeWarning, match=r"torch computes instead: .*ROCm"):
        assert not kernels._fused(OnGpu())
    assert not kernels._fused(OnGpu())  # a second warning would be an error
