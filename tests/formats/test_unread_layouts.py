"""Layouts that are not read: each is refused by its name, with what to fetch instead."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.unread_layouts import UNREAD_LAYOUTS
from tests.support.models import GOLDEN

MODULE = "model.layers.0.self_attn.q_proj"
ORIGINAL = "16-bit checkpoint for qmix quantize"

# What each tool saves of a linear layer, beside what others save too.
TENSORS = {
    "bitsandbytes LLM.int8": ("SCB", "weight"),
    "EXL2": ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm"),
    "EXL3": ("trellis", "suh", "svh"),
    "AQLM": ("codes", "codebooks", "scales"),
    "QuIP#": ("Qidxs", "SU", "SV", "Wscale", "codebook_id"),
    "SqueezeLLM": ("qweight", "lookup_table"),
    "VPTQ": ("indices", "centroids.weight", "centroids"),
}
METHODS = {
    "bitsandbytes LLM.int8": {"quant_method": "llm_int8"},
    "EXL2": {"quant_method": "exl2", "bits": 4.0},
    "EXL3": {"quant_method": "exl3"},
    "AQLM": {"quant_method": "aqlm", "nbits_per_codebook": 16},
    "QuIP#": {"quant_method": "quip"},
    "SqueezeLLM": {"quant_method": "SqueezeLLM", "wbits": 4},
    "VPTQ": {"quant_method": "vptq"},
    "MixFP4": {"quant_method": "compressed-tensors", "format": "mixfp4-pack-quantized"},
}
FILES = {
    "pickled HQQ": ("qmodel.pt", "axis=1"),
    "MLX in .npz files": ("weights.npz", "mlx-lm"),
}


def test_every_layout_has_a_test_of_each_of_its_signs():
    assert {layout.name for layout in UNREAD_LAYOUTS if layout.suffixes} == set(TENSORS)
    assert {layout.name for layout in UNREAD_LAYOUTS if layout.methods} == set(METHODS)
    assert {layout.name for layout in UNREAD_LAYOUTS if layout.files} == set(FILES)


@pytest.mark.parametrize("layout", TENSORS)
def test_a_layout_is_known_by_its_tensors_names(small_checkpoint, layout):
    file = next(small_checkpoint.glob("*.safetensors"))
    (small_checkpoint / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = load_file(file)
    del tensors[f"{MODULE}.weight"]
    tensors |= {f"{MODULE}.{suffix}": torch.zeros(2) for suffix in TENSORS[layout]}
    save_file(tensors, file)
    with pytest.raises(UnsupportedError, match=f"{layout} checkpoints are not read") as caught:
        open_checkpoint(small_checkpoint)
    message = str(caught.value)
    assert f"found {MODULE}." in message
    assert "Fetch" in message


@pytest.mark.parametrize("layout", METHODS)
def test_a_layout_is_known_by_its_settings(small_checkpoint, layout):
    document = json.loads((small_checkpoint / "config.json").read_text())
    document["quantization_config"] = METHODS[layout]
    (small_checkpoint / "config.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedError, match=f"{layout} checkpoints are not read") as caught:
        open_checkpoint(small_checkpoint)
    message = str(caught.value)
    assert message.startswith(str(small_checkpoint / "config.json"))
    assert ORIGINAL in message


@pytest.mark.parametrize("layout", FILES)
def test_a_layout_is_known_by_its_files_and_never_unpickled(small_checkpoint, layout):
    name, remedy = FILES[layout]
    next(small_checkpoint.glob("*.safetensors")).unlink()
    (small_checkpoint / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnsupportedError, match=f"{layout} checkpoints are not read") as caught:
        open_checkpoint(small_checkpoint)
    assert f"found {name}" in str(caught.value)
    assert remedy in str(caught.value)


def test_such_a_file_beside_safetensors_is_no_matter(small_checkpoint):
    (small_checkpoint / "qmodel.pt").write_bytes(b"")
    open_checkpoint(small_checkpoint)


def test_an_unknown_method_of_a_wrong_type_is_no_crash(small_checkpoint):
    document = json.loads((small_checkpoint / "config.json").read_text())
    for value in (None, 3, ["exl2"], {"exl2": 1}):
        document["quantization_config"] = {"quant_method": value}
        (small_checkpoint / "config.json").write_text(json.dumps(document))
        open_checkpoint(small_checkpoint)  # its tensors are dense, and decide


def test_mixfp4_without_its_name_is_known_by_a_negative_scale(tmp_path):
    folder = shutil.copytree(GOLDEN / "compressed-tensors-0.20.0" / "nvfp4", tmp_path / "mixed")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("experts.1.w2.weight_scale"))
    tensors[name].view(torch.uint8)[0, 0] |= 0x80
    save_file(tensors, file)
    checkpoint = open_checkpoint(folder)
    (tensor,) = (t for t in checkpoint.tensors if name.startswith(t.prefix + "."))
    with pytest.raises(UnsupportedError, match=f"tensor {name}: MixFP4 checkpoints are not read"):
        checkpoint.weight(tensor)
