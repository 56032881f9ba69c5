"""Misses on the CPU, hits on the device: both at a time."""

import torch

from qmix.experts import cpu_misses
from qmix.kernels import Routes
from qmix.kernels.gpu import packed_matmul


def test_the_cpu_has_its_inputs_before_the_hits_are_launched(monkeypatch):
    """A copy that follows the hits on the device waits for them, and the CPU waits with it."""
    calls, plain = [], torch.Tensor.cpu

    def hits(x, routes, experts):
        calls.append("hits")
        return torch.ones(*routes.ids.shape, x.shape[1])

    def misses(x, routes, experts, chosen):
        calls.append("misses")
        return torch.full((int(chosen.sum()), x.shape[1]), 10.0), [1]

    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: calls.append("down") or plain(tensor))
    monkeypatch.setattr(packed_matmul, "expert_pairs", hits)
    monkeypatch.setattr(cpu_misses, "pairs_on_host", misses)
    routes = Routes(torch.tensor([[0, 1]]), torch.full((1, 2), 0.5))
    split = cpu_misses.forward(torch.zeros(1, 4), routes, None, [True, False])
    assert calls == ["down"] * 3 + ["hits", "misses"]
    assert split.out.tolist() == [[11.0] * 4]
    assert split.missed == [1]
