"""`inspect` tells from the headers what a checkpoint holds."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmix
from qmix.commands.checkpoint.inspect import inspect
from qmix.errors import CheckpointError
from qmix.formats import Checkpoint, open_checkpoint
from qmix.weights.scheme import Scheme
from tests.support import packers
from tests.support.models import GOLDEN, quantized


def schemes(inventory):
    return {group.kind: (group.layout, group.scheme) for group in inventory.groups}


CASES = [
    (packers.gptq, {"sym": True}, {}, ("GPTQ", "int4 g32")),
    (packers.gptq, {"sym": False}, {"symmetric": False}, ("GPTQ", "int4 g32 asymmetric")),
    (packers.gptq, {}, {"group": -1, "act_order": True}, None),
    (packers.awq, {"quant_method": "awq"}, {"group": 64}, ("AWQ", "int4 g64 asymmetric")),
    (packers.compressed, None, {}, ("compressed-tensors", "int4 g32")),
]


@pytest.mark.parametrize(("pack", "settings", "options", "expected"), CASES)
def test_packed_layouts(tmp_path, monkeypatch, pack, settings, options, expected):
    packers.checkpoint(tmp_path, pack, settings, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", lambda *_: pytest.fail("data was read"))
        found = inspect(tmp_path)
    if expected:
        assert schemes(found)["expert"] == schemes(found)["attention"] == expected
    assert schemes(found)["router"] == schemes(found)["norm"] == ("safetensors", "float32")
    total = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert found.stored_bytes == total
    assert found.files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}
    assert json.loads(json.dumps(found.to_dict()))["stored_bytes"] == total
    # The same as the weights themselves say, but for AWQ's zeros.
    checkpoint = open_checkpoint(tmp_path)
    for tensor in checkpoint.tensors:
        if tensor.kind == "expert" and pack is not packers.awq:
            names = {group.scheme for group in found.groups if group.kind == "expert"}
            assert str(checkpoint.weight(tensor).scheme) in names


@pytest.mark.parametrize("double", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("block", [64, 128, 512])
def test_nf4(tiny, tmp_path, block, double):
    scheme = Scheme(kind="nf4", block_size=block, double_quant=double)
    found = inspect(quantized(tiny, tmp_path / "out", scheme))
    assert schemes(found)["expert"] == ("bitsandbytes", str(scheme))
    (experts,) = (group for group in found.groups if group.kind == "expert")
    assert abs(experts.bits_per_weight - scheme.bits_per_weight) < 0.7  # tiny weights, 1 kB tables


def test_a_dense_checkpoint(tiny):
    found = inspect(tiny)
    assert {group.layout for group in found.groups} == {"safetensors"}
    assert found.bits_per_weight == 16
    assert found.parameters == sum(
        torch.Size(t.shape).numel() for t in open_checkpoint(tiny).tensors
    )


def test_an_incomplete_one_is_refused(tmp_path):
    packers.checkpoint(tmp_path, packers.gptq, None)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.0.block_sparse_moe.experts.2.w3.qzeros")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*experts\.2\.w3\.qzeros"):
        inspect(tmp_path)


STATED = {
    "compressed-tensors-0.20.0/nvfp4": "llm-compressor (compressed-tensors 0.20.0)",
    "modelopt-0.47.0/nvfp4-experts": "modelopt 0.47.0",
    "gptqmodel-7.7.0": "gptqmodel 7.7.0",
    "auto-round-0.16.0": "auto-round 0.16.0",
    "mlx-0.32.4/affine4": "mlx-lm (not stated)",
    "hqq-0.2.8": "hqq (not stated)",
    "gguf-Q4_K_M.gguf": "llama.cpp (not stated)",
}


@pytest.mark.parametrize("name", STATED)
def test_the_maker_is_named(name):
    assert inspect(GOLDEN / name).maker == STATED[name]


def test_qmix_names_itself(tiny_nf4, tiny):
    assert inspect(tiny_nf4).maker == f"qmix {qmix.__version__}"
    assert inspect(tiny).maker == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("compressed-tensors-0.20.0/nvfp4", ("embedding", "router", "head")),
        ("modelopt-0.47.0/nvfp4-experts", ("embedding", "attention", "router", "head")),
        ("mlx-0.32.4/affine4", ()),
        ("mlx-0.32.4/mixed", ("1 of attention",)),
        ("gguf-Q4_K_M.gguf", ("router",)),
    ],
)
def test_what_is_left_as_it_was_is_named(name, expected):
    assert inspect(GOLDEN / name).not_quantized == expected


def test_schemes_have_their_names():
    def expert_schemes(name):
        return {one.scheme for one in inspect(GOLDEN / name).groups if one.kind == "expert"}

    assert expert_schemes("compressed-tensors-0.20.0/nvfp4") == {"NVFP4 b16"}
    assert expert_schemes("compressed-tensors-0.20.0/mxfp4") == {"MXFP4 b32"}
    assert expert_schemes("gguf-Q4_K_M.gguf") == {"Q4_K: int4 g32 asymmetric", "Q6_K: int6 g16"}


def test_bits_in_memory_are_told_beside_those_of_the_file():
    """Also where they are fewer: codes of 6 bits stay 6 bits."""
    found = inspect(GOLDEN / "compressed-tensors-0.20.0/nvfp4")
    assert found.loaded_bytes > found.stored_bytes
    kept = inspect(GOLDEN / "gguf-Q4_K_M.gguf")
    assert kept.loaded_bytes < kept.stored_bytes
    assert found.to_dict()["loaded_bytes"] == found.loaded_bytes
