"""MLX's checkpoints: equal to mlx's own values, its model's logits, and what is refused.

Files and expectations: tests/golden/make_mlx.py, run with mlx 0.32.4 and mlx-lm 0.32.2.
"""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.commands.checkpoint.verify import verify
from qmix.formats import open_checkpoint
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.embedding import Embedding
from qmix.nn.linear import Linear
from qmix.planning.stored_model import StoredModel
from qmix.weights.affine import Affine
from qmix.weights.dense import Dense
from qmix.weights.scales import NestedScales
from tests.support.models import GOLDEN

MLX = GOLDEN / "mlx-0.32.4"
EXPECTED = json.loads((MLX / "expected.json").read_text())
IDS = torch.arange(1, 9)[None]
PACKED = sorted(name for name in EXPECTED if name != "dense")
LAYER = "model.layers.0"
STACK = f"{LAYER}.block_sparse_moe.switch_mlp.up_proj"


def copied(name, folder):
    shutil.copytree(MLX / name, folder)
    return folder


def edited(folder, edit):
    """Change the tensors of a folder by `edit`, which gets them by name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def with_settings(folder, changes):
    document = json.loads((folder / "config.json").read_text())
    document.pop("quantization_config", None)
    document["quantization"] |= changes
    (folder / "config.json").write_text(json.dumps(document))


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
            assert abs(weight.memory_bytes(4) - found.nbytes) <= 4, tensor.name
    assert not verify(MLX / name).problems


def test_codes_of_four_bits_stay_as_they_are_and_those_of_five_and_six_become_bytes():
    checkpoint = open_checkpoint(MLX / "mixed")
    weights = {t.prefix: checkpoint.weight(t) for t in checkpoint.tensors if checkpoint.packed(t)}
    bits = {name.rpartition(".")[2]: weight.bits for name, weight in weights.items()}
    assert bits == {
        "embed_tokens": 4, "lm_head": 4, "gate": 4, "q_proj": 4, "k_proj": 4, "v_proj": 8,
        "w1": 2, "w3": 3, "w2": 8,
    }  # fmt: skip
    assert all(isinstance(weight, Affine) for weight in weights.values())
    assert weights[f"{LAYER}.self_attn.q_proj"].scheme.bits_per_weight == 4 + 64 / 32


def test_an_experts_scale_is_an_outer_scale():
    checkpoint = open_checkpoint(MLX / "nvfp4-experts")
    weight = next(checkpoint.weight(t) for t in checkpoint.tensors if t.kind == "expert")
    assert isinstance(weight.scales, NestedScales)
    assert weight.scales.outer.numel() == 1
    assert float(weight.scales.outer) != 1


@pytest.mark.parametrize("code", range(255))
def test_every_scale_of_mxfp4_is_a_power_of_two(code, tmp_path):
    folder = copied("mxfp4", tmp_path / "m")
    edited(folder, lambda tensors: tensors["lm_head.scales"].fill_(code))
    checkpoint = open_checkpoint(folder)
    weight = next(checkpoint.weight(t) for t in checkpoint.tensors if t.kind == "head")
    assert float(weight.scales.floats(0, 1)) == 2.0 ** (code - 127)
