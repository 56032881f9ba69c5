"""The one door to a layer's experts: each kind multiplies as the oracle does."""

import pytest
import torch
from torch.nn import functional as F

from qmix import kernels
from qmix.experts.layer_experts import GpuExperts, ResidentExperts
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.gpu import packed_matmul
from qmix.weights.expert import Expert
from tests.support.packed import nf4

WEIGHTS = [Expert(nf4(64, 128, i), nf4(128, 64, i + 1), nf4(64, 128, i + 2)) for i in range(4)]
X = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
ROUTES = Routes(torch.tensor([[0, 2], [2, 3], [3, 0]]), torch.full((3, 2), 0.5))


def resident(asked):
    return ResidentExperts(4, lambda index: asked.append(index) or WEIGHTS[index])


def oracle(act):
    with kernels.override("reference"):
        return kernels.experts(X, ROUTES, WEIGHTS, act)


@pytest.mark.parametrize("act", [F.silu, F.gelu])
def test_resident_experts_are_asked_for_as_they_are_now_and_only_if_chosen(act):
    asked = []
    out = resident(asked).forward(X, ROUTES, act)
    assert (out - oracle(act)).norm() < 1e-5 * out.norm()
    assert set(asked) == {0, 2, 3}


def test_gpu_experts_go_to_the_packed_kernels_where_these_can(monkeypatch):
    calls = []
    monkeypatch.setattr(packed_matmul, "experts", lambda x, r, w: calls.append(w) or x)
    monkeypatch.setitem(kernels._LINEAR, (kernels.PackedWeight, "cpu"), packed_matmul.linear)
    experts = GpuExperts(PackedExperts.pack(WEIGHTS))
    assert experts.forward(X, ROUTES, F.silu) is X
    assert calls == [experts.packed]
    x = X.clone().requires_grad_()
    out = experts.forward(x, ROUTES, F.silu)  # gradients, matrix by matrix
    assert (out - oracle(F.silu)).norm() < 1e-5 * out.norm()
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["resident", "gpu"])
def test_the_oracle_reads_every_kind(kind):
    experts = resident([]) if kind == "resident" else GpuExperts(PackedExperts.pack(WEIGHTS))
    with kernels.override("reference"):
        assert torch.equal(experts.forward(X, ROUTES, F.silu), oracle(F.silu))


def test_experts_are_a_sequence():
    experts = resident([])
    assert list(experts) == WEIGHTS
    assert experts[-1] is WEIGHTS[3]
    assert experts[1:3] == WEIGHTS[1:3]
    with pytest.raises(IndexError):
        experts[4]
    assert experts.packed is None
