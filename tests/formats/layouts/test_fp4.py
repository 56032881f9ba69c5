"""NVFP4 and MXFP4: read to the bits of their tools, and refused where they are damaged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.commands.checkpoint.inspect import inspect
from qmix.errors import CheckpointError, QmixError
from qmix.formats import open_checkpoint
from qmix.formats.layouts import fp4
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.weights.dense import Dense
from qmix.weights.table import Table
from tests.support.golden import (
    COMPRESSED,
    MODELOPT,
    TRANSFORMERS_FP8,
    expected_weights,
    golden_folder,
)

FP4 = [(MODELOPT, "nvfp4"), (MODELOPT, "nvfp4-experts"), (COMPRESSED, "nvfp4"),
       (COMPRESSED, "mxfp4"), (COMPRESSED, "mixed")]  # fmt: skip
P = "model.layers.0.block_sparse_moe.experts.1.w2"
IDS = torch.tensor([[5, 6, 7, 33, 3], [1, 0, 2, 63, 4]])

pytestmark = pytest.mark.filterwarnings("ignore:.*are not used", "ignore:.*FP8 weights")


@pytest.mark.parametrize(("maker", "name"), FP4)
def test_the_values_are_those_of_the_maker_in_float32(maker, name):
    checkpoint = open_checkpoint(golden_folder(maker, name))
    expected = expected_weights(maker, name)
    exact = {module: values for module, values in expected.items() if values.dtype == torch.float32}
    rounded = {module: values for module, values in expected.items() if module not in exact}
    seen = 0
    for tensor in checkpoint.tensors:
        if not tensor.linear or not checkpoint.packing(tensor):
            continue
        weight = checkpoint.weight(tensor)
        if isinstance(weight, Dense):
            continue
        assert isinstance(weight, Table)
        assert weight.scheme == checkpoint.metadata.scheme_of(checkpoint.packing(tensor))
        assert weight.scheme.bits_per_weight <= 4.6
        assert weight.nbytes <= weight.scheme.nbytes(weight.shape) + 4
        values = weight.dequantize(torch.float32)
        for key in (tensor.prefix, f"{tensor.prefix}.float32"):
            if key in exact:
                assert torch.equal(values, exact[key])
                seen += 1
        if tensor.prefix in rounded:
            assert torch.equal(weight.dequantize(torch.bfloat16), rounded[tensor.prefix])
    assert seen >= 1


@pytest.mark.parametrize(("maker", "name"), FP4)
def test_logits_are_those_of_a_dense_model_of_the_same_weights(maker, name, tmp_path):
    folder = golden_folder(maker, name)
    model = MixtralForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    checkpoint = open_checkpoint(folder)
    tensors = {
        t.name: (
            checkpoint.weight(t).dequantize(torch.float32)
            if checkpoint.packing(t)
            else checkpoint.read(t.name)
        )
        for t in checkpoint.tensors
    }
    save_file({name: data.contiguous() for name, data in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    document = json.loads((folder / "config.json").read_text())
    del document["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    dense = MixtralForCausalLM.from_pretrained(tmp_path, dtype="float32", device="cpu")
    with torch.no_grad():
        difference = (model(input_ids=IDS).logits - dense(input_ids=IDS).logits).abs().max()
    assert float(difference) < 1e-5


# What transformers 5.23.0 made of these folders, and of the experts' weights (2026-11-29).
IN_TRANSFORMERS = {
    (COMPRESSED, "nvfp4"): "noise",  # experts up to 2687 where 1.1 is meant
    (COMPRESSED, "mixed"): "noise",
    (COMPRESSED, "mxfp4"): "loads",
    (COMPRESSED, "fp8-tensor"): "loads",
    (COMPRESSED, "fp8-channel"): "loads",
    (TRANSFORMERS_FP8, "block"): "loads",
    (MODELOPT, "nvfp4"): "refuses",
    (MODELOPT, "fp8"): "noise",
}


@pytest.mark.parametrize(("maker", "name"), IN_TRANSFORMERS)
def test_what_other_programs_make_of_it_is_said(maker, name):
    readers = {
        entry.reader.split()[0]: entry for entry in inspect(golden_folder(maker, name)).readers
    }
    assert readers["transformers"].outcome == IN_TRANSFORMERS[maker, name]
    assert readers["transformers"].tried
    assert readers["gptqmodel"].outcome == "unknown"
    assert readers["qmix"].outcome == "loads"


def packed(**changes):
    """The tensors of a ModelOpt weight [8, 32], some of them changed; None removes one."""
    tensors = {
        "weight": torch.arange(128, dtype=torch.uint8).view(8, 16),
        "weight_scale": torch.full((8, 2), 1.5).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.25),
        "input_scale": torch.tensor(0.02),
    }
    tensors |= changes
    return {f"{P}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}


def exponents(value):
    return torch.full((8, 1), value, dtype=torch.uint8)


def of_compressed(**changes):
    renamed = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale",
               "input_scale": "input_global_scale"}  # fmt: skip
    tensors = {
        f"{P}.{renamed.get(suffix, suffix)}": tensor
        for suffix, tensor in ((name.rpartition(".")[2], t) for name, t in packed().items())
    }
    changed = {f"{P}.{name}": tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}


def test_a_weight_worked_out_by_hand():
    # The first input is the low nibble; code 15 is -6 and 1 is 0.5.
    codes = torch.full((8, 16), 0xF1, dtype=torch.uint8)
    weight = fp4.unpack_modelopt(packed(weight=codes), P, "f", (8, 32))
    assert weight.dequantize(torch.float32)[3, :4].tolist() == [0.1875, -2.25, 0.1875, -2.25]
    weight = fp4.unpack_compressed(of_compressed(weight_packed=codes), P, "f", (8, 32))
    assert weight.dequantize(torch.float32)[3, :4].tolist() == [3.0, -36.0, 3.0, -36.0]
    tensors = of_compressed(weight_packed=codes, weight_scale=exponents(126))
    weight = fp4.unpack_compressed(tensors, P, "f", (8, 32))
    assert weight.dequantize(torch.float32)[3, :4].tolist() == [0.25, -3.0, 0.25, -3.0]
    assert weight.block_size == 32


@pytest.mark.parametrize("value", [0, 1, 127, 254])
def test_every_exponent_but_the_last_is_a_scale(value):
    tensors = of_compressed(weight_scale=exponents(value))
    if value == 254:  # 2^127 times six
        with pytest.raises(CheckpointError, match="weight_scale: holds NaN, or scales beyond"):
            fp4.unpack_compressed(tensors, P, "f", (8, 32))
        return
    weight = fp4.unpack_compressed(tensors, P, "f", (8, 32))
    assert float(weight.scales.floats(0, 1)) == 2.0 ** (value - 127)


NAN = torch.full((8, 2), float("nan")).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight_scale": NAN}, "weight_scale: holds NaN.*16 others"),
        ({"weight_scale": torch.ones(8, 2)}, "weight_scale: wrong dtype.*float32"),
        ({"weight_scale": torch.ones(8, 3).to(torch.float8_e4m3fn)}, r"weight_scale: wrong shape.*\[8, 2\]"),
        ({"weight_scale": None}, "weight_scale: missing"),
        ({"weight": torch.zeros(8, 16, dtype=torch.int8)}, "weight: wrong dtype"),
        ({"weight": torch.zeros(8, 15, dtype=torch.uint8)}, r"weight: wrong shape.*\[8, 16\]"),
        ({"weight_scale_2": None}, "weight_scale_2: missing"),
        ({"weight_scale_2": torch.tensor(float("nan"))}, "weight_scale_2: wrong value.*nan"),
        ({"weight_scale_2": torch.tensor(0.0)}, "weight_scale_2: wrong value.*above 0"),
        ({"weight_scale_2": torch.ones(2)}, r"weight_scale_2: wrong shape.*\[2\]"),
        ({"weight_scale_2": torch.tensor(1)}, "weight_scale_2: wrong dtype.*int64"),
        ({"weight_scale_2": torch.tensor(3e38)}, "weight_scale: holds NaN, or scales beyond"),
        ({"input_scale": torch.tensor(float("inf"))}, "input_scale: wrong value.*inf"),
        ({"input_scale": torch.tensor(-1.0)}, "input_scale: wrong value"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        fp4.unpack_modelopt(packed(**changes), P, "f", (8, 32))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight_global_scale": None}, "weight_global_scale: missing"),
        ({"weight_global_scale": torch.tensor([1e-45])}, "weight_scale: holds NaN, or scales beyond"),
        ({"weight_scale": NAN}, "weight_scale: holds NaN"),
        ({"weight_scale": exponents(255)}, "weight_scale: holds NaN.*8 others"),
        ({"weight_scale": torch.zeros(8, 2, dtype=torch.uint8)}, "weight_scale: wrong shape"),
        ({"weight_packed": None}, "weight_packed: missing"),
        ({"input_global_scale": torch.zeros(1)}, "input_global_scale: wrong value"),
    ],
)  # fmt: skip
def test_compressed_tensors_that_are_damaged_are_refused_by_name(changes, named):
    with pytest.raises(CheckpointError, match=named):
        fp4.unpack_compressed(of_compressed(**changes), P, "f", (8, 32))


def edited(tmp_path, maker, name, *, settings=None, tensors=None, beside=None):
    """A golden folder with changed settings or tensors; `beside`: settings in ModelOpt's file."""
    folder = tmp_path / name
    shutil.copytree(golden_folder(maker, name), folder)
    document = json.loads((folder / "config.json").read_text())
    if settings is not None:
        settings(document["quantization_config"])
    if beside is not None:
        del document["quantization_config"]
        other = json.loads((folder / "hf_quant_config.json").read_text())
        beside(other)
        (folder / "hf_quant_config.json").write_text(json.dumps(other))
    (folder / "config.json").write_text(json.dumps(document))
    if tensors is not None:
        stored = load_file(folder / "model.safetensors")
        tensors(stored)
        save_file(stored, folder / "model.safetensors")
    return folder


def test_hf_quant_config_is_read_where_config_json_has_no_settings(tmp_path):
    folder = edited(tmp_path, MODELOPT, "nvfp4", beside=lambda document: None)
    settings = open_checkpoint(folder).metadata.settings["ModelOpt"]
    assert settings.algorithm == "NVFP4"
    assert settings.settings.where.endswith("hf_quant_config.json")
    (folder / "hf_quant_config.json").unlink()
    assert open_checkpoint(folder).metadata.settings["ModelOpt"].algorithm is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update(quant_algo="FP8"), "quant_algo.*contradicts.*'NVFP4'"),
        (lambda s: s.update(quant_algo="NVFP4_AWQ"), "ModelOpt's NVFP4_AWQ is not read"),
        (lambda s: s.update(quant_algo=None), "quant_algo.*one of NVFP4"),
        (lambda s: s.update(quant_method="awq"), "quant_method names another"),
        (lambda s: s.update(ignore=["model.layers.0.self_attn*"]), "ignore.*contradicts.*_proj"),
        (lambda s: s.update(ignore="lm_head"), "ignore.*a list of strings"),
        (lambda s: s.update(ignore=["*q_proj"] * 65), "at most 64"),
        (lambda s: s.update(ignore=["*v_proj"]), "ignore.*contradicts"),
        (lambda s: s.update(group_size=32), "group_size.*contradicts.*16"),
        (lambda s: s.update(quant_algo="MIXED_PRECISION"), "quantized_layers.*contradicts"),
    ],
)
def test_modelopts_settings_that_say_otherwise_are_refused(tmp_path, change, named):
    folder = edited(tmp_path, MODELOPT, "nvfp4", settings=change)
    with pytest.raises(QmixError, match=named):
        open_checkpoint(folder)


def test_a_dense_module_that_modelopt_does_not_exclude_is_refused(tmp_path):
    def change(settings):
        settings["ignore"] = ["lm_head"]

    folder = edited(tmp_path, MODELOPT, "nvfp4-experts", settings=change)
    with pytest.raises(CheckpointError, match=r"ignore.*self_attn\.q_proj among them"):
        open_checkpoint(folder)


def test_mixed_precision_names_each_module(tmp_path):
    layers = {}

    def change(settings):
        settings |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "ignore": []}

    checkpoint = open_checkpoint(golden_folder(MODELOPT, "nvfp4"))
    for tensor in checkpoint.tensors:
        if checkpoint.packing(tensor):
            layers[tensor.prefix] = {"quant_algo": "NVFP4", "group_size": 16}
    folder = edited(tmp_path, MODELOPT, "nvfp4", settings=change)
    assert open_checkpoint(folder).metadata.settings["ModelOpt"].layers


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update(format="mxfp4-pack-quantized"), "format.*contradicts.*'nvfp4-pack"),
        (lambda s: s["config_groups"]["group_0"]["weights"].update(num_bits=8), "num_bits.*4"),
        (lambda s: s["config_groups"]["group_0"]["weights"].update(type="int"), "type.*'float'"),
        (lambda s: s["config_groups"]["group_0"]["weights"].update(group_size=32), "group_size.*16"),
        (lambda s: s["config_groups"]["group_0"].update(format="pack-quantized"), "group_0.format"),
        (lambda s: s["config_groups"]["group_0"]["weights"].update(symmetric=False), "symmetric"),
    ],
)  # fmt: skip
def test_compressed_tensors_settings_that_say_otherwise_are_refused(tmp_path, change, named):
    folder = edited(tmp_path, COMPRESSED, "nvfp4", settings=change)
    with pytest.raises(QmixError, match=named):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.update(strategy="channel"), "strategy.*contradicts.*scales"),
        (lambda s: s.update(strategy="block", block_structure=[16, 32]), "strategy.*contradicts"),
        (lambda s: s.update(strategy="block", block_structure=[0, 32]), "block_structure.*above 0"),
        (lambda s: s.update(num_bits=4), "num_bits.*8"),
    ],
)
def test_fp8_settings_of_compressed_tensors_that_say_otherwise_are_refused(tmp_path, change, named):
    def edit(settings):
        change(settings["config_groups"]["group_0"]["weights"])

    folder = edited(tmp_path, COMPRESSED, "fp8-tensor", settings=edit)
    with pytest.raises(QmixError, match=named):
        open_checkpoint(folder)


def test_a_tensor_that_is_missing_or_left_over_is_named(tmp_path):
    def without(stored):
        del stored[f"{P}.weight_scale_2"]

    folder = edited(tmp_path, MODELOPT, "nvfp4", tensors=without)
    with pytest.raises(CheckpointError, match=rf"1 missing.*missing {P}.weight_scale_2"):
        open_checkpoint(folder)

    def more(stored):
        stored[f"{P}.pre_quant_scale"] = torch.ones(4)

    folder = edited(tmp_path / "more", MODELOPT, "nvfp4", tensors=more)
    with pytest.raises(CheckpointError, match=rf"1 left over.*left over {P}.pre_quant_scale"):
        open_checkpoint(folder)


@pytest.mark.parametrize(("maker", "name"), [
    (COMPRESSED, "int4-kv"), (COMPRESSED, "nvfp4"), (COMPRESSED, "fp8-tensor"),
    (MODELOPT, "nvfp4"), (MODELOPT, "nvfp4-experts"), (MODELOPT, "fp8")])  # fmt: skip
@pytest.mark.filterwarnings("default")
def test_scales_of_a_cache_are_read_and_said_once(maker, name):
    checkpoint = open_checkpoint(golden_folder(maker, name))
    assert len(checkpoint.metadata.cache_scales) == 2
    with pytest.warns(UserWarning, match="2 scales of a KV cache are not used") as warned:
        MixtralForCausalLM.from_pretrained(golden_folder(maker, name), device="cpu")
    texts = [str(warning.message) for warning in warned]
    assert sum("not used" in text for text in texts) == 1


def test_int4_with_a_rounded_cache_reads_the_same_weights():
    checkpoint = open_checkpoint(golden_folder(COMPRESSED, "int4-kv"))
    expected = expected_weights(COMPRESSED, "int4-kv")
    for tensor in checkpoint.tensors:
        if tensor.prefix in expected:
            assert torch.equal(checkpoint.weight(tensor).dequantize(), expected[tensor.prefix])


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.tensor([float("nan")]), "nan"),
        (torch.tensor([0.0]), r"\[0\.0\]"),
        (torch.tensor([1]), "int64"),
        (torch.ones(3), r"\[3\] of float32"),
    ],
)
def test_a_scale_of_a_cache_that_is_none_is_refused(tmp_path, value, found):
    name = "model.layers.0.self_attn.k_proj.k_scale"
    folder = edited(
        tmp_path, MODELOPT, "nvfp4", tensors=lambda stored: stored.update({name: value})
    )
    with pytest.raises(CheckpointError, match=rf"{name}: not the scale of a KV cache.*{found}"):
        open_checkpoint(folder)


def test_a_scale_of_a_cache_of_no_layer_is_left_over(tmp_path):
    name = "model.layers.7.self_attn.k_scale"
    tensors = {name: torch.ones(1)}
    folder = edited(tmp_path, COMPRESSED, "int4-kv", tensors=lambda stored: stored.update(tensors))
    with pytest.raises(CheckpointError, match=f"left over {name}"):
        open_checkpoint(folder)
