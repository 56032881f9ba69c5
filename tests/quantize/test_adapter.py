"""qmix quantize --adapter: what PEFT merges, bit for bit, and quantized like any other weight."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix import strict_json
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from qmix.quantize.adapter import open_adapter, with_adapter
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.run import quantize_calibrated
from qmix.quantize.calibrated.windows import calibration_windows
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.quantize.source import open_source
from qmix.weights.scheme import Recipe, Scheme
from tests.support.lora import write_lora
from tests.support.models import GOLDEN, small_model
from tests.support.process import qmix

PEFT = GOLDEN / "peft-0.21.2"
BASE = PEFT / "base"
CASES = ("experts", "patterns", "rslora", "dora", "whole", "stacked")


def merged(name):
    return load_file(PEFT / f"{name}-merged.safetensors")


def tensors_of(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_files(first, second):
    found, expected = tensors_of(first), tensors_of(second)
    assert found.keys() == expected.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []


def merged_checkpoint(name, folder):
    """The base with PEFT's merged weights, as a checkpoint."""
    shutil.copytree(BASE, folder)
    checkpoint = open_checkpoint(BASE)
    tensors = {tensor.name: checkpoint.read(tensor.name) for tensor in checkpoint.tensors}
    save_file({**tensors, **merged(name)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_the_one_that_peft_merges(name):
    checkpoint = open_checkpoint(BASE)
    adapter = open_adapter(PEFT / name, checkpoint)
    expected = merged(name)
    assert adapter.updates.keys() == expected.keys()
    for tensor in checkpoint.tensors:
        found = replace(checkpoint, change=adapter).dense(tensor)
        assert torch.equal(found, expected.get(tensor.name, checkpoint.read(tensor.name)))


@pytest.mark.parametrize("name", ["whole", "stacked"])
@pytest.mark.parametrize("method", ["nf4", "rtn"])
def test_merging_while_quantizing_is_quantizing_what_peft_merged(name, method, tmp_path):
    request = QuantizeRequest(method=method, group_size=-1 if method == "rtn" else None)
    adapted = replace(request, adapter=PEFT / name)
    quantize_checkpoint(BASE, tmp_path / "out", adapted, None)
    source = merged_checkpoint(name, tmp_path / "merged")
    quantize_checkpoint(source, tmp_path / "expected", request, None)
    same_files(tmp_path / "out", tmp_path / "expected")
    stated = strict_json.read(tmp_path / "out" / "qmix_manifest.json")["adapter"]
    assert stated["name"] == name
    assert len(stated["sha256"]) == 64


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "1.0.0"])
def test_square_experts_are_read_as_their_peft_wrote_them(tmp_path, version):
    """Where a matrix is square, the version says which of its axes PEFT took for inputs."""
    small_model(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(
        tmp_path / "base"
    )
    module, rank, experts = "model.layers.0.mlp.experts", 4, 8
    shapes = {f"{module}.lora_A.weight": (32, 64), f"{module}.lora_B.weight": (64, 32)}
    tensors = write_lora(tmp_path / "lora", shapes, peft_version=version)
    a, b = (tensors[name] for name in shapes)
    a, b = a.reshape(experts, rank, 64), b.reshape(64, rank, experts)
    axes = "e i o" if version in (None, "0.18.1") else "e o i"
    update = torch.einsum(f"o r e, e r i -> {axes}", b, a) * 0.5  # as in both PEFTs
    checkpoint = open_checkpoint(tmp_path / "base")
    adapter = open_adapter(tmp_path / "lora", checkpoint)
    assert len(adapter.updates) == experts
    for tensor in checkpoint.tensors:
        if tensor.name in adapter.updates:
            expert = int(tensor.name.split(".experts.")[1].split(".")[0])
            found = adapter(tensor, checkpoint.read(tensor.name))
            expected = checkpoint.read(tensor.name) + update[expert]
            assert tensor.name.endswith("w2.weight")
            assert torch.equal(found, expected)


def test_the_command_merges_too(tmp_path):
    done = qmix("quantize", BASE, tmp_path / "out", "--adapter", PEFT / "experts")
    assert done.returncode == 0, done.stderr
    assert qmix("verify", tmp_path / "out").returncode == 0


def test_gptq_rounds_what_peft_merged(tmp_path):
    text = "".join(chr(48 + index * 7 % 60) for index in range(2000))
    calibration = calibration_windows(
        text, lambda part: [ord(c) - 48 for c in part], samples=2, seqlen=32
    )
    recipe = Recipe.uniform(Scheme(kind="int4", group_size=-1), attention=True)
    sources = {
        "out": with_adapter(open_source(BASE), PEFT / "whole"),
        "expected": open_source(merged_checkpoint("whole", tmp_path / "merged")),
    }
    for out, source in sources.items():
        quantize_calibrated(source, tmp_path / out, recipe, calibration, CalibratedOptions())
    same_files(tmp_path / "out", tmp_path / "expected")


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(PEFT / "experts", tmp_path / "lora")
    return tmp_path / "lora"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"peft_type": "LOHA"}, UnsupportedError, "peft_type: not a LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "init_lora_weights"),
        ({"layer_replication": [[0, 1]]}, UnsupportedError, "layer_replication.*merge_and_unload"),
        ({"trainable_token_indices": [3]}, UnsupportedError, "trainable_token_indices"),
        ({"lora_alpha": "much"}, CheckpointError, "lora_alpha: wrong type"),
        ({"alpha_pattern": {"(a+)+": 3.0, "(": 1}}, QmixError, "alpha_pattern"),
        ({"alpha_pattern": {"w1": None}}, CheckpointError, "alpha_pattern: wrong type"),
    ],
    ids=str,
)
def test_another_kind_of_adapter_is_refused_by_what_it_is(copied, changes, error, named):
    edit_config(copied, **changes)
    with pytest.raises(error, match=named):
        open_adapter(copied, open_checkpoint(BASE))


def without_b(tensors):
    del tensors[next(name for name in tensors if "lora_B" in name)]


def of_another_layer(tensors):
    name = next(iter(tensors))
    tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


def narrow(tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


def with_bias(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (without_b, "a factor without the other"),
        (of_another_layer, "a factor without the other|of another model"),
        (narrow, "wrong shape"),
        (with_bias, "of another model.*bias"),
        (dict.clear, "holds nothing"),
    ],
)
def test_damaged_factors_are_refused_by_name(copied, edit, named):
    tensors = load_file(copied / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, copied / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=named):
        open_adapter(copied, open_checkpoint(BASE))


def test_nan_in_a_factor_ends_the_run_and_leaves_nothing(copied, tmp_path):
    tensors = load_file(copied / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, copied / "adapter_model.safetensors")
    request = QuantizeRequest(method="nf4", adapter=copied)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight"):
        quantize_checkpoint(BASE, tmp_path / "out", request, None)
    assert not (tmp_path / "out").exists()


def test_missing_and_pickled_weights_are_told_apart(copied, tmp_path):
    (copied / "adapter_model.safetensors").rename(copied / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"a pickle.*safe_serialization=True"):
        open_adapter(copied, open_checkpoint(BASE))
    with pytest.raises(CheckpointError, match=r"no adapter; expected adapter_config\.json"):
        open_adapter(BASE, open_checkpoint(BASE))


def test_an_adapter_that_changes_meanwhile_is_noticed(copied):
    adapter = open_adapter(copied, open_checkpoint(BASE))
    adapter.check_unchanged()
    edit_config(copied, lora_alpha=5)
    with pytest.raises(CheckpointError, match="changed while it was merged"):
        adapter.check_unchanged()
