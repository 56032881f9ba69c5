"""Backends: their names, the one that a block or a model takes, and the choice among them."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.errors import UnsupportedError, UsageError
from qmix.kernels import backend, bnb, choice, tiles
from qmix.kernels.backend import BACKENDS, VARIABLE, named, preferred
from qmix.kernels.cpu import matmul
from qmix.kernels.cpu.library import library
from qmix.kernels.gpu import probe
from qmix.weights.dense import Dense
from qmix.weights.nf4 import quantize
from qmix.weights.scheme import Scheme

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
NF4, INT4 = Scheme(kind="nf4"), Scheme(kind="int4")


def test_a_name_is_that_of_the_call_or_else_of_the_environment(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert named(None) is None
    monkeypatch.setenv(VARIABLE, "torch")
    assert named(None) == "torch"
    assert named("qmix") == "qmix"
    assert named("auto") is None
    monkeypatch.setenv(VARIABLE, "")
    assert named(None) is None


def test_an_unknown_name_is_refused_where_it_was_given(monkeypatch):
    with pytest.raises(UsageError, match=r"^backend: no such backend.*auto, qmix.*'cuda'"):
        named("cuda")
    monkeypatch.setenv(VARIABLE, "cublas")
    with pytest.raises(UsageError, match=r"^QMIX_BACKEND: no such backend.*'cublas'"):
        named(None)


def test_a_models_backend_ends_with_its_block_and_yields_to_an_override():
    assert backend.current() == "qmix"
    with preferred("torch"):
        assert backend.current() == "torch"
        with preferred("qmix"):
            assert backend.current() == "torch"
    with kernels.override("reference"), preferred("torch"):
        assert backend.current() == "reference"
    assert backend.current() == "qmix"


def matrix(n, k, seed=0):
    return 0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_torch_takes_no_compiled_kernel(monkeypatch):
    weight, dense = quantize(matrix(64, 128).bfloat16()), Dense(matrix(64, 128))
    x = matrix(3, 128, 1)
    oracle = x @ weight.dequantize(torch.float32).T
    for module, name in ((matmul, "linears"), (kernels, "library"), (kernels.dense, "linear")):
        monkeypatch.setattr(module, name, None)
    with kernels.override("torch"):
        assert torch.equal(kernels.linear(x, weight), tiles.linear(x, weight))
        assert torch.equal(kernels.linear(x, dense), F.linear(x, dense.data))
        (out,) = kernels.linears(x, [weight])
    assert (out - oracle).abs().max() <= 1e-5 * oracle.abs().max()


@pytest.fixture
def refusals(monkeypatch):
    """Why each backend cannot run; none of them is tried."""
    reasons = {}
    for module, name in ((probe, "qmix"), (bnb, "bitsandbytes")):
        monkeypatch.setattr(module, "why_not", lambda *_, name=name: reasons.get(name))
    return reasons


def test_on_a_gpu_the_first_that_is_right_is_taken(refusals):
    assert choice.choose(None, CUDA, torch.bfloat16, {NF4}) == "qmix"
    refusals["qmix"] = UnsupportedError("too old", remedy="Buy another.")
    with pytest.warns(UserWarning, match=r"bitsandbytes: too old\. Buy another\."):
        assert choice.choose(None, CUDA, torch.bfloat16, {NF4}) == "bitsandbytes"
    refusals["bitsandbytes"] = UnsupportedError("not installed")
    with pytest.warns(UserWarning, match=r"torch: too old\. Buy another\.") as seen:
        assert choice.choose(None, CUDA, torch.bfloat16, {NF4}) == "torch"
    assert len(seen) == 1


def test_a_named_backend_is_no_other(refusals):
    for name in BACKENDS:
        assert choice.choose(name, CUDA, torch.bfloat16, {NF4}) == name
    refusals["qmix"] = UnsupportedError("too old")
    with pytest.raises(UnsupportedError, match="too old"):
        choice.choose("qmix", CUDA, torch.bfloat16, {NF4})
    assert choice.choose("torch", CUDA, torch.bfloat16, {NF4}) == "torch"


def test_on_the_cpu_our_kernels_are_taken_and_without_a_compiler_torch_for_them(monkeypatch):
    assert choice.choose(None, CPU, torch.bfloat16, {NF4}) == "qmix"
    with monkeypatch.context() as patched:
        patched.setenv("QMIX_CPU_PATH", "torch")
        library.cache_clear()
        assert choice.choose(None, CPU, torch.bfloat16, {NF4}) == "qmix"
        with pytest.raises(UnsupportedError, match="no compiled kernels"):
            choice.choose("qmix", CPU, torch.bfloat16, {NF4})
    library.cache_clear()
    library()


def test_the_verdict_of_each_device_names_the_reason(refusals, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(choice, "library", lambda: SimpleNamespace(isa="avx2"))
    on_cpu, *on_gpus = choice.survey()
    assert on_cpu == choice.Verdict("cpu", "qmix")
    assert on_gpus == [choice.Verdict(f"cuda:{i}, Card {i}", "qmix") for i in range(2)]
    refusals["qmix"] = UnsupportedError("too old")
    _, on_gpu, _ = choice.survey()
    assert on_gpu == choice.Verdict("cuda:0, Card 0", "bitsandbytes", refusals["qmix"])
    monkeypatch.setenv(VARIABLE, "qmix")
    assert choice.survey()[1] == choice.Verdict("cuda:0, Card 0", None, refusals["qmix"])
    monkeypatch.setenv(VARIABLE, "torch")
    assert {verdict.backend for verdict in choice.survey()} == {"torch"}


@pytest.mark.usefixtures("compiled")
def test_our_kernels_may_be_named_on_the_cpu():
    assert choice.choose("qmix", CPU, torch.bfloat16, {NF4, INT4}) == "qmix"
