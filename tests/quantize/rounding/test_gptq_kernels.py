"""Rounding groups by kernels on a machine without a GPU: interpreted, as PTX, counted, chosen."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from qmix.kernels.gpu import probe
from qmix.kernels.gpu.card import Card
from qmix.kernels.trial import Comparison
from qmix.quantize.rounding import gptq_choice, gptq_kernels
from qmix.quantize.rounding.gptq_choice import KERNEL_SIZES, group_steps, kernels_of
from qmix.quantize.rounding.gptq_group import GroupLoops, GroupOptions
from qmix.quantize.rounding.gptq_kernels import GroupKernels
from qmix.weights.scheme import Scheme
from tests.support.interpreter import run_apart
from tests.support.soak import both

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INT4 = Scheme(kind="int4", group_size=128)
DEFAULTS = GroupOptions(live_scales=True, scale_search=True, trials=8)


@pytest.mark.slow
@both
def test_the_kernels_in_the_interpreter(soak):
    run_apart("gptq", interpreted=True, soak=soak)


@pytest.mark.slow
@both
def test_the_kernels_as_ptx(soak):
    assert "skipped" not in run_apart("gptq", interpreted=False, as_ptx=True, soak=soak)


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", KERNEL_SIZES)
def test_the_kernels_of_this_gpu_are_right(size, symmetric):
    scheme = Scheme(kind="int4", group_size=size, symmetric=symmetric)
    assert gptq_choice.first_miss(CUDA, size, scheme, DEFAULTS) is None


@pytest.mark.parametrize("first", [0, 64, 256, 448, 1024])
@pytest.mark.parametrize("matrices", [1, 3])
def test_a_product_in_parts_is_the_product(matrices, first):
    """Of few outputs; errors before `first` are zeros."""
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(matrices, 1024, 1024, generator=generator)
    errors = torch.randn(matrices, 1024, 40, generator=generator)
    errors[:, :first] = 0
    kernels, loops = GroupKernels(INT4, DEFAULTS, CPU), GroupLoops(INT4, DEFAULTS)
    for factors in (square[:, :, 64:128], square[:, 64:128].mT):
        wanted = loops.product(factors, errors, first)
        found = kernels.product(factors, errors, first)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_many_outputs_are_one_product(monkeypatch):
    monkeypatch.setattr(torch, "bmm", lambda *_, **__: pytest.fail("in parts"))
    factors, errors = torch.empty(1, 256, 32), torch.zeros(1, 256, 128 * 128)
    assert GroupKernels(INT4, DEFAULTS, CPU).product(factors, errors, 0).shape == (1, 32, 16384)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as the choice sees it; returns what the trial of the kernels finds, and the trials."""
    card = Card(name="NVIDIA H100", capability=(9, 0), triton="3.7.1", compiler="gcc")
    outcome, trials = {"card": card, "miss": None}, []

    def first_miss(device, *arguments):
        trials.append((device, *arguments))
        if isinstance(outcome["miss"], Exception):
            raise outcome["miss"]
        return outcome["miss"]

    gptq_choice._usable.cache_clear()
    monkeypatch.delenv("QMIX_BACKEND", raising=False)
    monkeypatch.setattr(probe, "card", lambda device: outcome["card"])
    monkeypatch.setattr(probe, "_answers", lambda device: True)
    monkeypatch.setattr(gptq_choice, "first_miss", first_miss)
    monkeypatch.setattr(gptq_kernels, "GroupKernels", lambda *arguments: "kernels")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield outcome, trials
    gptq_choice._usable.cache_clear()


def test_kernels_round_on_a_gpu_once_they_have_been_tried(gpu):
    _, trials = gpu
    for _ in range(2):
        assert group_steps(CUDA, 128, INT4, DEFAULTS) == "kernels"
    assert trials == [(torch.device("cuda:0"), 128, INT4, DEFAULTS)]


def test_torch_rounds_what_the_kernels_do_not(gpu, monkeypatch):
    _, trials = gpu
    assert isinstance(group_steps(CPU, 128, INT4, DEFAULTS), GroupLoops)
    whole = Scheme(kind="int4", group_size=-1)
    assert isinstance(group_steps(CUDA, 4096, whole, DEFAULTS), GroupLoops)
    monkeypatch.setenv("QMIX_BACKEND", "torch")
    assert isinstance(group_steps(CUDA, 128, INT4, DEFAULTS), GroupLoops)
    assert trials == []


def test_a_run_knows_whose_kernels_made_its_bytes(gpu, monkeypatch):
    assert kernels_of(CUDA) == "Triton 3.7.1"
    assert kernels_of(CPU) is None
    monkeypatch.setenv("QMIX_BACKEND", "torch")
    assert kernels_of(CUDA) is None


WRONG = Comparison("codes after rounding groups of 128", torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"miss": WRONG}, "wrong results: codes after rounding"),
        ({"miss": RuntimeError("CUDA error: no kernel image")}, "no kernel image"),
        (
            {"card": Card(name="T4", capability=(7, 5), triton="3.7.1")},
            "too old for the kernels",
        ),
    ],
    ids=["wrong", "fails", "refused"],
)
def test_torch_rounds_with_one_warning_where_the_kernels_fail(gpu, change, words):
    gpu[0].update(change)
    with pytest.warns(UserWarning, match=f"torch rounds instead.*{words}"):
        assert isinstance(group_steps(CUDA, 128, INT4, DEFAULTS), GroupLoops)
    assert isinstance(group_steps(CUDA, 128, INT4, DEFAULTS), GroupLoops)  # a second is an error
