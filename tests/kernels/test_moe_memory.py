"""A long prompt through dequantized experts takes what its plan says, however it is routed."""

import pytest
import torch

pytest.importorskip("triton")

from qmix.config import MixtralConfig
from qmix.kernels import Routes
from qmix.kernels.gpu import moe
from qmix.planning import budget
from qmix.planning.stored_model import StoredModel
from qmix.weights.packed.packed_shapes import ExpertFormat
from qmix.weights.packed.table import ExpertTable
from qmix.weights.packed.tile_format import TileFormat
from qmix.weights.scheme import NF4
from tests.support.live_bytes import LiveBytes

HIDDEN, INNER, TOKENS, EXPERTS = 64, 256, 600, 8


def peak(monkeypatch, ids):
    def dequantized(addresses, expert, offset, tile_format, second, out):
        return out.normal_(0, 0.05)

    monkeypatch.setattr(moe, "_dequantize", dequantized)
    tiles = TileFormat("nf4", 64)
    addresses = torch.zeros(1, EXPERTS, dtype=torch.int64)
    alike = ExpertFormat(tiles, tiles, (2 * INNER, HIDDEN))
    table = ExpertTable(addresses, (alike,) * EXPERTS, [])
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    routes = Routes(ids, torch.full((TOKENS, 2), 0.5))
    with LiveBytes() as live, torch.no_grad():
        moe._dense_experts(x, routes, table, 0)
    return live.peak


def test_one_expert_that_takes_all_tokens_fits_the_plan(monkeypatch):
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    model = StoredModel.assume("model", config, NF4)
    planned = budget._device_prefill(model, TOKENS, 1)
    spread = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(TOKENS)])
    one = torch.tensor([[3, 5]]).expand(TOKENS, 2)
    stream = 6 * 2 * TOKENS * HIDDEN  # the rest of the layer, which the plan counts too
    most = peak(monkeypatch, one)
    order = 3 * 8 * 2 * TOKENS  # int64, of pairs: nothing beside the reserve of a real plan
    assert peak(monkeypatch, spread) < most <= planned - stream + order
    assert most > 0.9 * (planned - stream)  # and no more is set aside than is needed
