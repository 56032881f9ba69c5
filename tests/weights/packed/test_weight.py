"""Packed weights in a model: unpacked exactly, saved unchanged, refused, moved and copied."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from qmix import MixtralForCausalLM, kernels
from qmix.formats import open_checkpoint
from qmix.generation.packed_layers import layer_weights, supported
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.gpu import packed_matmul
from qmix.models import load
from qmix.models.pack import Packer
from qmix.nn.linear import Linear
from qmix.weights.expert import Expert
from qmix.weights.packed import weight as packed
from qmix.weights.scales import NestedScales
from qmix.weights.table import Table
from tests.support.models import small_model
from tests.support.packed import KINDS, OTHERS, act_order, int4, int8, nf4
from tests.support.process import succeeds


def tensors_of(weight):
    parts = [weight.codes]
    if isinstance(weight, Table):
        nested = isinstance(weight.scales, NestedScales)
        parts += [weight.scales.codes, weight.scales.outer] if nested else [weight.scales]
        return parts
    return [*parts, weight.scales, *(t for t in (weight.zeros, weight.perm) if t is not None)]


def assert_equal(back, weight):
    assert type(back) is type(weight)
    assert (back.shape, back.dtype, back.scheme) == (weight.shape, weight.dtype, weight.scheme)
    for one, other in zip(tensors_of(back), tensors_of(weight), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_comes_back_bit_for_bit(kind):
    weight = KINDS[kind](256, 128)
    found = packed.pack(weight)
    assert_equal(found.unpack(), weight)
    assert (found.shape, found.scheme, found.dtype) == (weight.shape, weight.scheme, weight.dtype)
    assert torch.equal(found.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert torch.equal(found.rows(3, 9), weight.rows(3, 9))
    assert found.template.codes.numel() == 0
    assert found.to(torch.device("cpu")) is found
    assert isinstance(found, kernels.PackedWeight)


@pytest.mark.parametrize("kind", KINDS)
def test_joined_matrices_come_back_bit_for_bit(kind):
    weights = [KINDS[kind](rows, 128, seed) for seed, rows in enumerate((256, 128, 128))]
    whole, parts = packed.pack_joined(weights)
    assert whole.shape == (512, 128)
    dense = torch.cat([weight.dequantize(torch.float32) for weight in weights])
    assert torch.equal(whole.dequantize(torch.float32), dense)
    for part, weight in zip(parts, weights, strict=True):
        assert part.shape == weight.shape
        assert_equal(part.unpack(), weight)
        bare = packed.PackedWeight(part.source, part.selection, None).unpack()
        assert torch.equal(bare.codes, weight.codes)
    assert sum(part.nbytes for part in parts) == whole.nbytes


def test_matrices_that_differ_are_not_joined():
    with pytest.raises(kernels.UnsupportedError, match="no packed layout"):
        packed.pack_joined([nf4(128, 128), int4(128, 128)])
    orders = [act_order(128, 128), replace(act_order(128, 128), perm=torch.arange(128).int())]
    with pytest.raises(kernels.UnsupportedError, match="in one order"):
        packed.pack_joined(orders)


def layer_of(make, count=4, hidden=128, width=64):
    return [
        Expert(make(width, hidden, s), make(hidden, width, s + 1), make(width, hidden, s + 2))
        for s in range(0, 10 * count, 10)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_come_back_bit_for_bit(kind):
    experts = layer_of(KINDS[kind], width=128)
    found = PackedExperts.pack(experts)
    assert len(found) == 4
    for one, other in zip(found, experts, strict=True):
        for part in ("w1", "w2", "w3"):
            assert_equal(getattr(one, part).unpack(), getattr(other, part))
    blobs = found.table.blobs[0]
    assert sum(w.nbytes for e in found for w in (e.w1, e.w2, e.w3)) == sum(b.nbytes for b in blobs)


def test_what_was_drawn_in_packed_order_has_a_standard_form_too():
    matrix = packed.PackedWeight(packed.pack(nf4(128, 64)).source, None, None)
    assert matrix.scheme.kind == "nf4"
    assert not matrix.scheme.double_quant
    assert matrix.unpack().shape == (128, 64)
    assert packed.PackedWeight(packed.pack(int4(128, 64)).source, None, None).scheme.symmetric


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_addresses_of_its_own(again):
    found = PackedExperts.pack(layer_of(nf4))
    other = again(found)
    for expert in range(4):
        blob = other.table.blobs[0][expert]
        assert other.table.addresses[0, expert] == blob.data_ptr()
        assert blob.data_ptr() != found.table.blobs[0][expert].data_ptr()
        assert torch.equal(blob, found.table.blobs[0][expert])
    assert_equal(other[1].w3.unpack(), found[1].w3.unpack())


def quantized_model(make=nf4, **changes):
    widths = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
    model = small_model(**{**widths, "num_key_value_heads": 4, "num_hidden_layers": 2, **changes})
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, Linear) and not name.endswith(("gate", "lm_head")):
            module.store(make(module.out_features, module.in_features, seed))
    return model


def place(model):
    packer = Packer()
    packer.pack(model)
    return packer


def test_a_model_is_packed_once_and_says_the_same(monkeypatch):
    """Without a GPU every matmul reads the unpacked weight through `rows`."""
    model, twin = quantized_model(), quantized_model()
    packer = place(model)
    assert packer.complete
    assert packer.packed == 2 * (4 + 8 * 3)
    assert str(packer) == "56 of 56 quantized matrices in the packed layout"
    assert place(model).packed == 0
    ids = torch.arange(2, 9)[None]
    with kernels.override("reference"), torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)


@pytest.mark.parametrize("make", [nf4, KINDS["nf4 nested"], int4, act_order])
def test_a_packed_model_is_saved_as_it_came(make, tmp_path):
    model, twin = quantized_model(make), quantized_model(make)
    place(model)
    model.save_pretrained(tmp_path / "packed")
    twin.save_pretrained(tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == names
    for name in names:
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_layers_are_packed_as_they_are_read(tmp_path):
    """Each layer once it is complete, and before any weight of the next one is there."""
    quantized_model().save_pretrained(tmp_path / "nf4")
    checkpoint = open_checkpoint(tmp_path / "nf4")
    with torch.device("meta"):
        model = MixtralForCausalLM(checkpoint.config)
    layers = list(model.model.layers)
    seen = []

    def finish(layer):
        assert not any(p.is_meta for p in layer.parameters())
        assert all(p.is_meta for later in layers[len(seen) + 1 :] for p in later.parameters())
        seen.append(layer)

    modules = dict(model.named_modules())
    load.fill(modules, checkpoint, torch.float32, torch.device("cpu"), finish)
    assert seen == layers


def test_what_is_refused_is_counted():
    model = quantized_model(hidden_act="gelu")
    packer = place(model)
    assert not packer.complete
    assert packer.separate.total() == 2
    assert packer.packed == 56  # each matrix has its kernel, the layer as a whole has none
    assert "layers whose experts are multiplied one by one: 2: the kernels fuse SiLU" in str(packer)
    odd = quantized_model(
        hidden_size=80, intermediate_size=80, num_attention_heads=5, num_key_value_heads=5,
        head_dim=16, make=lambda n, k, s: int4(n, k, s, group=16),
    )  # fmt: skip
    packer = place(odd)
    assert packer.packed == 0
    assert packer.refused.total() == 56
    assert "dequantized before every matmul (56: no packed layout for this shape)" in str(packer)


def test_a_router_is_not_packed_and_is_no_reason_to_warn():
    model = quantized_model()
    gate = model.model.layers[0].block_sparse_moe.gate
    gate.store(nf4(gate.out_features, gate.in_features))
    assert place(model).complete
    assert isinstance(gate.stored, Table)
    weights = layer_weights(model.model.layers[0])
    assert torch.equal(weights.gate, gate.stored.dequantize(torch.float32))


@pytest.mark.parametrize(
    "kind", ["int8", "int6 nested g16", "int2 g64", "int3 g128", "e2m1 b16", "own table"]
)
def test_a_model_of_any_kind_is_packed_whole(kind):
    model, twin = (quantized_model(OTHERS[kind], num_hidden_layers=1) for _ in range(2))
    packer = place(model)
    assert packer.complete, packer
    assert packer.packed == 28
    assert supported(model.model)
    ids = torch.arange(2, 9)[None]
    with kernels.override("reference"), torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)


def test_moved_away_a_packed_model_is_a_standard_one():
    model = quantized_model()
    place(model)
    block = model.model.layers[0].block_sparse_moe
    assert block.stored.packed is not None
    model.float()  # a change of dtype moves nothing
    assert block.stored.packed is not None
    model.to("meta")
    assert block.stored.packed is None
    assert isinstance(block.experts[0].w1.stored, Table)


def test_gradients_go_around_the_kernels(monkeypatch):
    monkeypatch.setitem(kernels._LINEAR, (kernels.PackedWeight, "cpu"), packed_matmul.linear)
    model, twin = quantized_model(), quantized_model()
    place(model)
    inputs = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    found, expected = (inputs.clone().requires_grad_() for _ in range(2))
    model(inputs_embeds=found).logits.sum().backward()
    twin(inputs_embeds=expected).logits.sum().backward()
    assert torch.allclose(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_the_kernels_are_asked_without_gradients(monkeypatch):
    asked = []
    monkeypatch.setattr(
        packed_matmul, "experts", lambda x, routes, weights: asked.append(weights) or x
    )
    experts = PackedExperts.pack(layer_of(nf4))
    x = torch.randn(3, 128)
    routes = Routes(torch.zeros(3, 2, dtype=torch.int64), torch.full((3, 2), 0.5))
    assert kernels.packed_experts(x, routes, experts, F.silu) is x
    assert asked == [experts]
    with kernels.override("reference"):
        out = kernels.packed_experts(x, routes, experts, F.silu)
    assert len(asked) == 1
    assert not torch.equal(out, x)


def test_loading_packed_weights_imports_no_triton():
    code = "import sys, qmix.models.load, qmix.models.pack; sys.exit('triton' in sys.modules)"
    succeeds(code)


def test_a_model_whose_experts_have_several_forms_is_packed_whole():
    """As `--method auto` makes them: also for a recorded step."""
    makes, model = (nf4, int4, int8), quantized_model()
    for layer in model.model.layers:
        for index, module in enumerate(layer.block_sparse_moe.experts):
            (expert,) = layer_of(makes[index % 3], 1, width=128)
            for name, weight in vars(expert).items():
                getattr(module, name).store(weight)
    packer = place(model)
    assert packer.complete
    tables = [layer.block_sparse_moe.stored.packed.table for layer in model.model.layers]
    assert [len(table.gate_up) for table in tables] == [3, 3]
    assert all(layer_weights(layer) is not None for layer in model.model.layers)


def test_experts_of_several_forms_are_packed_and_can_lie_elsewhere():
    mixed = [*layer_of(nf4, 2, width=128), *layer_of(int4, 2, width=128)]
    packed = PackedExperts.pack(mixed)
    blobs = [expert.blob.clone() for expert in packed.packed]
    moved = packed.moved_to(blobs, torch.tensor([[blob.data_ptr() for blob in blobs]]))
    for one, blob, other in zip(moved, blobs, mixed, strict=True):
        assert_equal(one.w2.unpack(), other.w2)
        assert one.w2.matrix.blob.data_ptr() - blob.data_ptr() < len(blob)
