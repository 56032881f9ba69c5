"""Every backend of the kernel table against `x @ w.dequantize().T`."""

import pytest
import torch

from qmix import kernels
from qmix.errors import UsageError
from qmix.kernels import Routes, tiles
from qmix.kernels.attention import attend_with, reference
from qmix.kernels.attention_mask import AttentionMask, visible
from qmix.weights.dense import Dense
from qmix.weights.expert import Expert
from qmix.weights.nf4 import quantize
from qmix.weights.table import Table
from tests.support.models import small_model


def matrix(n, k, seed=0, dtype=torch.bfloat16):
    return (0.05 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).to(dtype)


def inputs(m, k, dtype, seed=1):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", [Dense, quantize])
@pytest.mark.parametrize("shape", [(64, 64), (130, 96), (7, 33), (1, 64), (300, 2048)])
@pytest.mark.parametrize("batch", [1, 2, 17, 33])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_linear_matches_the_oracle(kind, shape, batch, dtype, bound):
    weight = kind(matrix(*shape, dtype=dtype))
    x = inputs(batch, shape[1], dtype)
    oracle = x.float() @ weight.dequantize(torch.float32).T
    out = kernels.linear(x, weight)
    assert out.dtype == dtype
    assert (out.float() - oracle).abs().max() <= bound * oracle.abs().max()
    with kernels.override("reference"):
        again = kernels.linear(x, weight)
    assert (again.float() - oracle).abs().max() <= bound * oracle.abs().max()


def test_rows_are_slices_of_dequantize():
    for shape in ((16, 96), (5, 33), (3, 7), (64, 256)):
        weight = quantize(matrix(*shape))
        whole = weight.dequantize()
        for start in range(shape[0]):
            for stop in range(start + 1, shape[0] + 1, 3):
                assert torch.equal(weight.rows(start, stop), whole[start:stop])


def test_an_nf4_product_never_holds_more_than_one_tile(monkeypatch):
    weight = quantize(matrix(1000, 1024))
    seen = []
    original = Table.rows

    def rows(self, start, stop, dtype=None):
        seen.append((stop - start) * self.shape[1])
        return original(self, start, stop, dtype)

    monkeypatch.setattr(Table, "rows", rows)
    monkeypatch.setattr(tiles, "TABLE_TILE_ELEMENTS", 64 * 1024)
    tiles.linear(inputs(4, 1024, torch.float32), weight)
    assert sum(seen) == 1000 * 1024
    assert max(seen) <= tiles.TABLE_TILE_ELEMENTS


def expert(seed, kind, d=64, f=96):
    return Expert(
        w1=kind(matrix(f, d, seed)),
        w2=kind(matrix(d, f, seed + 1)),
        w3=kind(matrix(f, d, seed + 2)),
    )


@pytest.mark.parametrize("kind", [Dense, quantize])
@pytest.mark.parametrize("routing", ["spread", "all to one", "single token"])
def test_experts_match_the_oracle(kind, routing):
    experts = [expert(10 * i, kind) for i in range(4)]
    tokens = 1 if routing == "single token" else 9
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    if routing == "all to one":
        ids[:] = torch.tensor([2, 0])
    weights = torch.rand(tokens, 2)
    routes = Routes(ids, weights / weights.sum(-1, keepdim=True))
    x = inputs(tokens, 64, torch.bfloat16)
    out = kernels.experts(x, routes, experts, torch.nn.functional.silu)
    with kernels.override("reference"):
        oracle = kernels.experts(x, routes, experts, torch.nn.functional.silu)
    assert (out.float() - oracle.float()).abs().max() <= 2e-2 * oracle.float().abs().max()


def test_only_chosen_experts_are_asked_for_once_each_and_in_order():
    class Asked(list):
        def __getitem__(self, index):
            order.append(index)
            return super().__getitem__(index)

        def __iter__(self):
            raise AssertionError("all experts were touched")

    experts, order = Asked(expert(10 * i, quantize) for i in range(8)), []
    for ids in ([[5, 2]], [[5, 2], [7, 5], [2, 5]]):
        order.clear()
        routes = Routes(torch.tensor(ids), torch.tensor([[0.7, 0.3]]).expand(len(ids), 2))
        x = inputs(len(ids), 64, torch.float32)
        kernels.experts(x, routes, experts, torch.nn.functional.silu)
        assert order == torch.tensor(ids).unique().tolist()


def test_experts_scaled_by_their_number_give_the_sum_computed_by_hand():
    """w1 opens the gate, w3 and w2 are the identity times i: the answer is known beforehand."""
    eye = torch.eye(4)
    experts = [Expert(Dense(50 * eye), Dense((i + 1.0) * eye), Dense(eye)) for i in range(3)]
    x = torch.full((1, 4), 2.0)
    routes = Routes(torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]]))
    out = kernels.experts(x, routes, experts, torch.nn.functional.silu)
    assert torch.allclose(out, torch.full((1, 4), 0.75 * 3 * 200 + 0.25 * 200))


def test_route_is_softmax_then_top_k_then_renormalised_in_float32():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]], dtype=torch.bfloat16)
    routes = kernels.route(logits, 2)
    assert routes.ids.tolist() == [[1, 2]]
    assert routes.weights.dtype == torch.float32
    assert torch.allclose(routes.weights, torch.tensor([[1.0, 0.0]]).add(0).copy_(
        torch.tensor([3.0, 2.0]).softmax(-1)[None]))  # fmt: skip


@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 16])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_attention_matches_plain_softmax_at_every_window_edge(queries, window, groups):
    q = inputs(8 * queries, 16, torch.float32).view(1, 8, queries, 16)
    k = inputs(groups * 16, 16, torch.float32, 2).view(1, groups, 16, 16)
    v = inputs(groups * 16, 16, torch.float32, 3).view(1, groups, 16, 16)
    padding_mask = torch.ones(1, 16, dtype=torch.bool)
    padding_mask[:, :3] = False
    for mask in (None, padding_mask):
        oracle = reference(q, k, v, visible(queries, 16, window, mask))
        out = attend_with("sdpa", q, k, v, AttentionMask(window, mask))
        assert (out - oracle).abs().max() < 1e-5
        assert torch.isfinite(out).all()


def test_each_query_sees_exactly_its_window():
    mask = visible(10, 10, 4, None)[0, 0]
    assert mask.sum(-1).tolist() == [min(i + 1, 4) for i in range(10)]
    assert mask[9].nonzero()[:, 0].tolist() == [6, 7, 8, 9]


def test_an_unknown_override_is_refused_and_a_known_one_ends_with_its_block():
    with pytest.raises(UsageError), kernels.override("fastest"):
        pass
    model = small_model()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        with kernels.override("reference"):
            oracle = model(input_ids=tokens).logits
    assert (plain - oracle).abs().max() < 1e-4


def test_moving_a_packed_model_to_another_dtype_keeps_its_scales():
    model = small_model()
    linear = model.model.layers[0].self_attn.q_proj
    linear.store(quantize(matrix(64, 64)))
    before = linear.stored.dequantize(torch.float32)
    model.to(torch.float16)
    assert torch.equal(linear.stored.dequantize(torch.float32), before)
    assert model.lm_head.weight.dtype == torch.float16
