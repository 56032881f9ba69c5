"""MLX's checkpoints: equal to mlx's own values and its model's logits, and used like any other.

Files and expectations: tests/golden/make_mlx.py, run with mlx 0.32.4 and mlx-lm 0.32.2.
"""

import hashlib
import json

import pytest
import torch

from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.checkpoint.verify import verify
from qmix.errors import UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.metadata import read_metadata
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.models.offload import Tiers
from qmix.models.options import LoadOptions
from qmix.models.pack import Packer
from qmix.nn.cpu_decode import WhyNot
from qmix.nn.embedding import Embedding
from qmix.nn.linear import Linear
from qmix.planning.stored_model import StoredModel
from qmix.quantize.streaming import quantize_streaming
from qmix.weights import nf4
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense
from qmix.weights.scales import NestedScales
from qmix.weights.scheme import NF4, Recipe
from tests.support.golden import MLX, copied_mlx, edit_tensors

EXPECTED = json.loads((MLX / "expected.json").read_text())
IDS = torch.arange(1, 9)[None]
PACKED = sorted(name for name in EXPECTED if name != "dense")
LAYER = "model.layers.0"


def digest(weight):
    values = weight.dequantize(torch.float32) + 0.0
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", PACKED)
def test_every_weight_is_mlxs_to_the_bit_in_float32(name):
    checkpoint = open_checkpoint(MLX / name)
    found = {
        tensor.prefix: digest(checkpoint.weight(tensor))
        for tensor in checkpoint.tensors
        if checkpoint.packed(tensor)
    }
    assert found == EXPECTED[name]["weights"]
    assert "model.embed_tokens" in found
    assert f"{LAYER}.block_sparse_moe.gate" in found


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_logits_are_those_of_mlx_lm(name):
    model = MixtralForCausalLM.from_pretrained(MLX / name, dtype="float32", device="cpu")
    logits = model(IDS).logits[0]
    dense = dequantized(model)(IDS).logits[0]
    assert torch.allclose(logits, dense, rtol=0, atol=1e-5)
    if EXPECTED[name]["logits"] is not None:
        theirs = torch.tensor(EXPECTED[name]["logits"])
        assert torch.allclose(logits, theirs, rtol=0, atol=2e-5)


def dequantized(model):
    """The same model with dense weights."""
    dense = MixtralForCausalLM(model.config.replace(tie_word_embeddings=False)).eval()
    for module, other in zip(model.modules(), dense.modules(), strict=True):
        if isinstance(module, Linear | Embedding):
            other.store(Dense(module.stored.dequantize(torch.float32)))
        elif getattr(module, "weight", None) is not None:
            other.weight = module.weight
    return dense


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_schemes_and_bytes_of_the_headers_are_those_of_the_weights(name):
    checkpoint = open_checkpoint(MLX / name)
    stored = StoredModel.of(checkpoint.metadata)
    for tensor, weight in zip(checkpoint.tensors, stored.weights, strict=True):
        if checkpoint.packed(tensor):
            found = checkpoint.weight(tensor)
            assert weight.scheme == found.scheme, tensor.name
            assert abs(weight.nbytes(4) - found.nbytes) <= 4, tensor.name
    assert not verify(MLX / name).problems


def test_codes_keep_their_bits():
    checkpoint = open_checkpoint(MLX / "mixed")
    weights = {t.prefix: checkpoint.weight(t) for t in checkpoint.tensors if checkpoint.packed(t)}
    bits = {name.rpartition(".")[2]: weight.bits for name, weight in weights.items()}
    assert bits == {
        "embed_tokens": 4, "lm_head": 4, "gate": 4, "q_proj": 4, "k_proj": 4, "v_proj": 5,
        "w1": 2, "w3": 3, "w2": 6,
    }  # fmt: skip
    assert all(isinstance(weight, Affine) for weight in weights.values())
    assert weights[f"{LAYER}.self_attn.q_proj"].scheme.bits_per_weight == 4 + 64 / 32


def test_an_experts_scale_is_an_outer_scale():
    checkpoint = open_checkpoint(MLX / "nvfp4-experts")
    weight = next(checkpoint.weight(t) for t in checkpoint.tensors if t.kind == "expert")
    assert isinstance(weight.scales, NestedScales)
    assert weight.scales.outer.numel() == 1
    assert float(weight.scales.outer) != 1


@pytest.mark.parametrize("first", [0, 80, 160, 173])  # from 253 on, a code of 6 is infinite
def test_every_scale_of_mxfp4_is_a_power_of_two(first, tmp_path):
    folder, codes = copied_mlx("mxfp4", tmp_path / "m"), torch.arange(first, first + 80)
    edit_tensors(folder, lambda tensors: tensors["lm_head.scales"].view(-1).copy_(codes))
    checkpoint = open_checkpoint(folder)
    weight = next(checkpoint.weight(t) for t in checkpoint.tensors if t.kind == "head")
    assert weight.scales.floats(0, 80).double().equal(torch.exp2(codes.double() - 127))


@pytest.mark.parametrize("name", ["affine4", "mixed", "mxfp4", "nvfp4-experts"])
def test_saving_is_refused_by_name_and_leaves_nothing(name, tmp_path):
    model = MixtralForCausalLM.from_pretrained(MLX / name, device="cpu")
    with pytest.raises(UnsupportedError, match="no layout that qmix writes holds such a weight"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_dense_checkpoint_of_mlx_is_saved_with_the_hubs_names(tmp_path):
    model = MixtralForCausalLM.from_pretrained(MLX / "dense", device="cpu")
    model.save_pretrained(tmp_path / "saved")
    again = read_metadata(tmp_path / "saved")
    assert f"{LAYER}.block_sparse_moe.experts.1.w3.weight" in again.tensor_infos
    saved = MixtralForCausalLM.from_pretrained(tmp_path / "saved", device="cpu")
    assert saved(IDS).logits.equal(model(IDS).logits)


def test_inspect_names_the_layout_the_schemes_and_the_readers():
    found = inspect(MLX / "affine4")
    kinds = {group.kind: (group.layout, group.scheme) for group in found.groups}
    assert kinds["embedding"] == kinds["expert"] == kinds["router"]
    assert kinds["expert"] == ("MLX", "int4 g64 asymmetric")
    readers = {reader.reader: reader.outcome for reader in found.readers}
    assert readers == {
        "qmix": "loads",
        "vLLM 0.33": "refuses",
        "SGLang 0.5.23": "refuses",
        "transformers 5.23": "refuses",
        "gptqmodel 7.7": "unknown",
        "mlx-lm 0.32": "loads",
    }


def test_a_packed_router_goes_through_the_modules():
    model = MixtralForCausalLM.from_pretrained(MLX / "affine4", device="cpu")
    layer = model.model.layers[0]
    assert layer.compiled() is WhyNot.DENSE_PARTS
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 12)


def test_experts_that_stay_in_the_file_give_the_same_logits():
    for name in ("affine4", "mixed", "nvfp4-experts"):
        checkpoint = open_checkpoint(MLX / name)
        options = LoadOptions(device="cpu", dtype="float32")
        whole = MixtralForCausalLM.from_checkpoint(checkpoint, options)
        tiers = Tiers(device=0, host=2)
        offloaded = MixtralForCausalLM.from_checkpoint(checkpoint, options, tiers=tiers)
        assert offloaded.store is not None
        with torch.no_grad():
            assert offloaded(IDS).logits.equal(whole(IDS).logits), name


def test_a_quantized_source_is_not_quantized_again(tmp_path):
    recipe = Recipe.uniform(NF4, attention=True)
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize_streaming(MLX / "affine4", tmp_path / "out", recipe, method="nf4")


def test_a_dense_source_with_stacked_experts_is_quantized(tmp_path):
    recipe = Recipe.uniform(NF4, attention=True)
    quantize_streaming(MLX / "dense", tmp_path / "out", recipe, method="nf4")
    source, out = open_checkpoint(MLX / "dense"), open_checkpoint(tmp_path / "out")
    for tensor in source.tensors:
        if tensor.kind == "expert":
            exact = source.weight(tensor).dequantize(torch.float32)
            rounded = nf4.quantize(exact.bfloat16(), NF4).dequantize(torch.float32)
            assert out.weight(tensor).dequantize(torch.float32).equal(rounded)


def test_without_a_dtype_in_the_config_it_is_that_of_the_last_norm(tmp_path):
    folder = copied_mlx("affine8", tmp_path / "m")
    document = json.loads((folder / "config.json").read_text())
    del document["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(document))
    assert open_checkpoint(folder).dtype == torch.float16


@pytest.mark.parametrize("name", ["affine4", "mixed", "nvfp4"])
def test_every_matrix_has_a_packed_form_but_the_router(name):
    model = MixtralForCausalLM.from_pretrained(MLX / name, dtype="float32", device="cpu")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    plain = {n: m.stored.dequantize(torch.float32) for n, m in linears.items()}
    packer = Packer()
    packer.pack(model)
    assert packer.packed == len(EXPECTED[name]["weights"]) - 2  # without embedding and router
    assert not packer.refused
    for n, module in linears.items():
        found = module.stored.dequantize(torch.float32)
        assert (found - plain[n]).abs().max() < 2**-10 * plain[n].abs().max(), n
