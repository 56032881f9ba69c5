"""Queries, keys and values as one matrix: only while nobody has to see q, k and v by themselves."""

import pytest
import torch
from torch import nn

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.nn.attention import Attention, ForwardContext
from qmix.weights.packed.weight import pack_joined
from tests.support.packed import nf4

CONFIG = MixtralConfig(
    hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_hidden_layers=1
)
X = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(0))
PARTS = ("q_proj", "k_proj", "v_proj")


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def attention(*, fused):
    module = Attention(CONFIG, 0).eval()
    for seed, linear in enumerate(module.projections):
        linear.store(nf4(linear.out_features, linear.in_features, seed))
    if fused:
        module.store_fused_qkv(*pack_joined([part.stored for part in module.projections[:3]]))
    return module


def run(module):
    context = ForwardContext.without_past(CONFIG, 3, X.device, X.dtype)
    with kernels.override("reference"), torch.no_grad():
        return module(X, context)


@pytest.mark.parametrize("name", PARTS)
def test_an_adapter_on_a_part_of_a_fused_matrix_is_called(name):
    fused, separate = attention(fused=True), attention(fused=False)
    plain = run(fused)
    for module in (fused, separate):
        setattr(module, name, Adapter(getattr(module, name)))
    assert not torch.allclose(run(fused), plain)
    assert torch.equal(run(fused), run(separate))
    setattr(fused, name, getattr(fused, name).base)
    assert torch.equal(run(fused), plain)


@pytest.mark.parametrize("name", PARTS)
def test_a_hook_on_a_part_of_a_fused_matrix_is_called(name):
    module, seen = attention(fused=True), []
    plain = run(module)
    handle = getattr(module, name).register_forward_hook(lambda *given: seen.append(given[2]))
    assert torch.equal(run(module), plain)
    assert [tuple(out.shape) for out in seen] == [(1, 3, getattr(module, name).out_features)]
    handle.remove()
    run(module)
    assert len(seen) == 1


def test_an_adapter_on_the_queries_can_be_moved_and_taken_off():
    module = attention(fused=True)
    plain = run(module)
    module.q_proj = Adapter(module.q_proj)
    module.to("cpu")
    module.q_proj = module.q_proj.base
    assert module.fused_qkv is not None
    assert torch.equal(run(module), plain)
    module.to("meta")
    assert module.fused_qkv is None
