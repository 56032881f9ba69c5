"""Settings that contradict the tensors are refused by field; what only describes is passed over."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix.errors import QmixError
from qmix.formats.checkpoint import open_checkpoint
from qmix.formats.layouts import bnb, compressed_tensors
from qmix.formats.metadata import read_metadata
from qmix.weights import nf4
from qmix.weights.scheme import NF4, Scheme
from tests.support import packers
from tests.support.models import small_model
from tests.support.packers import uniform

W2 = "model.layers.1.block_sparse_moe.experts.3.w2"
Q = "model.layers.0.self_attn.q_proj"
SCHEME = Scheme(kind="int4", group_size=32)

# As llm-compressor writes it, with the fields of several versions.
COMPRESSED = {
    **compressed_tensors.quantization_config(uniform(SCHEME)),
    "config_groups": {
        "group_0": {
            "format": None,
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "scale_dtype": None,
                "strategy": "group",
                "symmetric": True,
                "type": "int",
                "zp_dtype": None,
            },
        }
    },
    "global_compression_ratio": 1.89,
    "kv_cache_scheme": None,
    "sparsity_config": {"format": "dense", "global_sparsity": 0.1, "ignore": [], "targets": []},
    "transform_config": {},
    "version": "0.20.0",
}
# As transformers writes it.
BNB = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head", "gate"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
# As AutoGPTQ, transformers and gptqmodel write it.
GPTQ = {
    "batch_size": 1,
    "bits": 4,
    "block_name_to_quantize": "model.layers",
    "checkpoint_format": "gptq",
    "damp_percent": 0.1,
    "dataset": None,
    "desc_act": False,
    "exllama_config": {"version": 1},
    "group_size": 32,
    "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    "model_file_base_name": "model",
    "modules_in_block_to_quantize": [["self_attn.k_proj", "self_attn.v_proj"]],
    "pack_dtype": "int32",
    "quant_method": "gptq",
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}
AWQ = {
    "backend": "autoawq",
    "bits": 4,
    "do_fuse": False,
    "exllama_config": None,
    "fuse_max_seq_len": None,
    "group_size": 32,
    "modules_to_not_convert": ["gate"],
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}


def write_bnb(folder):
    model = small_model(intermediate_size=128, num_hidden_layers=2, num_local_experts=4)
    tensors = {}
    for name, value in model.state_dict().items():
        if value.dim() == 1 or name.endswith(("gate.weight", "embed_tokens.weight", "head.weight")):
            tensors[name] = value.clone()
        else:
            tensors |= bnb.pack(nf4.quantize(value.half(), NF4), name.removesuffix(".weight"))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One small checkpoint of each layout, by name."""
    base = tmp_path_factory.mktemp("checkpoints")
    packers.checkpoint(base / "compressed", packers.compressed, None)
    packers.checkpoint(base / "gptq", packers.gptq, None)
    packers.checkpoint(base / "awq", packers.awq, None, symmetric=False)
    write_bnb(base / "bnb")
    return base


SETTINGS = {"compressed": COMPRESSED, "bnb": BNB, "gptq": GPTQ, "awq": AWQ}


def read(folders, layout, changes):
    """Read the metadata with changed settings; a name with full stops leads to an inner object."""
    settings = copy.deepcopy(SETTINGS[layout])
    for path, value in changes.items():
        target, *inner = path.split(".")
        place = settings
        for part in inner:
            place, target = place[target], part
        if value is ...:
            del place[target]
        else:
            place[target] = value
    path = folders / layout / "config.json"
    document = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps(document))
    return read_metadata(folders / layout)


G, GW = "config_groups.group_0", "config_groups.group_0.weights"
HADAMARD = {"config_groups": {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"]}]}}}
CONTRADICTIONS = [
    *[("compressed", f"{GW}.num_bits", value) for value in (2, 3, 8, "4", 4.0, True, [4])],
    *[("compressed", f"{GW}.group_size", value) for value in (0, 16, 64, -1, -2, None, "32", 32.0)],
    *[("compressed", f"{GW}.strategy", value) for value in ("evil", "channel", "tensor", 3, [1])],
    *[("compressed", f"{GW}.type", value) for value in ("float", 4)],
    *[("compressed", f"{GW}.symmetric", value) for value in (False, "true", 1)],
    *[("compressed", f"{GW}.actorder", value) for value in ("group", "dynamic", True, "evil", 1)],
    *[("compressed", f"{GW}.dynamic", value) for value in (True, "local", 0)],
    ("compressed", f"{G}.weights", None),
    ("compressed", f"{G}.weights", [4]),
    ("compressed", f"{G}.format", "int-quantized"),
    ("compressed", f"{G}.input_activations", {"num_bits": 8, "type": "int", "dynamic": True}),
    ("compressed", f"{G}.output_activations", {"num_bits": 8, "type": "float"}),
    ("compressed", f"{G}.targets", ["lm_head"]),
    ("compressed", f"{G}.targets", ["re:.*experts.*"]),
    ("compressed", f"{G}.targets", []),
    ("compressed", f"{G}.targets", "Linear"),
    ("compressed", "config_groups", [1]),
    ("compressed", "config_groups.group_0", ["Linear"]),
    ("compressed", f"{GW}.block_structure", [128, 128]),
    ("compressed", "config_groups", {}),
    ("compressed", "quantization_status", "evil"),
    ("compressed", "ignore", []),
    ("compressed", "ignore", ["re:.*"]),
    ("compressed", "ignore", ["Linear"]),
    ("compressed", "ignore", [W2]),
    ("compressed", "ignore", ["re:.*w2$"]),
    ("compressed", "ignore", [4]),
    ("compressed", "ignore", ["re:" + ".*.*.*" + ".?" * 8 + "!"]),
    ("compressed", "ignore", ["re:a{99999999999}"]),
    ("compressed", "format", "int-quantized"),
    ("compressed", "quant_method", "gptq"),
    ("compressed", "quant_method", ["compressed-tensors"]),
    ("compressed", "transform_config", HADAMARD),
    ("compressed", "sparsity_config", {"format": "sparse-24-bitmask"}),
    ("compressed", "kv_cache_scheme", 8),
    ("bnb", "bnb_4bit_quant_type", "fp4"),
    ("bnb", "bnb_4bit_quant_type", "int4"),
    ("bnb", "bnb_4bit_quant_type", 4),
    ("bnb", "bnb_4bit_use_double_quant", False),
    ("bnb", "bnb_4bit_use_double_quant", "true"),
    ("bnb", "bnb_4bit_compute_dtype", "evil"),
    ("bnb", "bnb_4bit_quant_storage", 8),
    ("bnb", "load_in_8bit", True),
    ("bnb", "_load_in_8bit", True),
    ("bnb", "load_in_4bit", False),
    ("bnb", "load_in_4bit", "yes"),
    ("bnb", "quant_method", "gptq"),
    ("bnb", "quant_method", "compressed-tensors"),
    ("bnb", "bnb_4bit_blocksize", 128),
    ("bnb", "bnb_4bit_blocksize", 0),
    ("bnb", "bnb_4bit_blocksize", "64"),
    *[
        ("bnb", "llm_int8_skip_modules", value)
        for value in ([Q], ["w2"], ["self_attn"], ["model.layers.1"], "w2", [3])
    ],
    *[("gptq", "desc_act", value) for value in ("false", 0, "group")],
    *[("gptq", "lm_head", value) for value in (True, "no")],
    *[("gptq", "pack_dtype", value) for value in ("int8", "int64", 32)],
    *[("gptq", "group_size", value) for value in (0, -2, 48, 64, -1, "32")],
    *[("gptq", "bits", value) for value in (0, 2, 3, 8, "4", 4.0)],
    *[("gptq", "dynamic", value) for value in ([1], {"a": 4}, {"a": {"bits": 1}}, {"a(": {}})],
    *[
        ("gptq", "dynamic", {rule: overrides})
        for rule, overrides in (("-:.*w2", {}), (".*w2", {"bits": 8}), (Q, {"group_size": 64}))
    ],
    ("gptq", "dynamic", {"a": {"desc_act": "false"}}),
    ("gptq", "dynamic", {"a": {"pack_dtype": "int8"}}),
    *[("awq", "desc_act", value) for value in ("false", 0)],
    ("awq", "lm_head", True),
    ("awq", "pack_dtype", "int16"),
    *[("awq", "group_size", value) for value in (0, 64, -1, "32", -3)],
    ("awq", "q_group_size", 128),
    *[("awq", field, value) for field in ("bits", "w_bit") for value in (2, 8, "4")],
    *[("awq", field, "gemv") for field in ("version", "format", "checkpoint_format")],
    ("awq", "zero_point", "yes"),
    ("awq", "quant_method", "gptq"),
    *[("awq", "modules_to_not_convert", value) for value in ([Q], ["experts"], 3)],
]


@pytest.mark.parametrize(
    ("layout", "field", "value"), CONTRADICTIONS, ids=lambda value: str(value)[:40]
)
def test_a_field_that_contradicts_the_tensors_is_refused_by_name(folders, layout, field, value):
    with pytest.raises(QmixError, match=field.rpartition(".")[2]) as caught:
        read(folders, layout, {field: value})
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(str(folders / layout / "config.json"))
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)


DESCRIPTIVE = [
    *[(layout, {}) for layout in SETTINGS],
    ("compressed", {f"{GW}.actorder": "static"}),
    ("compressed", {f"{GW}.actorder": "weight", f"{GW}.observer": "mse"}),
    ("compressed", {f"{GW}.{name}": ... for name in ("dynamic", "symmetric", "type", "strategy")}),
    ("compressed", {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}),
    ("compressed", {"sparsity_config": {}, "quantization_status": "frozen"}),
    ("compressed", {"sparsity_config": None, "transform_config": {"config_groups": {}}}),
    ("compressed", {"config_groups": ...}),
    ("compressed", {"ignore": ["lm_head", "re:.*block_sparse_moe.gate", "re:.*mlp.gate$"]}),
    ("compressed", {f"{G}.targets": ["re:.*_proj$", r"re:.*\.w[123]$"]}),
    ("compressed", {f"{G}.targets": ["re:.*self_attn.*", r"re:.*mlp.experts.*(gate|up|down)_proj"]}),
    ("compressed", {f"{G}.targets": ["re:^(?!.*lm_head).*"]}),
    ("bnb", {"llm_int8_skip_modules": None, "llm_int8_threshold": 0.0}),
    ("bnb", {"_load_in_4bit": ..., "_load_in_8bit": ..., "bnb_4bit_quant_storage": ...}),
    ("bnb", {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "bfloat16"}),
    ("bnb", {"bnb_4bit_blocksize": 64, "quant_method": ...}),
    ("gptq", {"desc_act": [False], "bits": [4], "group_size": [32], "pack_dtype": None}),
    ("gptq", {"desc_act": True, "act_group_aware": True, "format": "gptq"}),
    ("gptq", {"lm_head": ..., "dynamic": {r"-:.*\.gate$": {}}}),
    ("awq", {"modules_to_not_convert": None, "version": "GEMM"}),
    ("awq", {"bits": ..., "w_bit": 4, "q_group_size": 32, "format": "gemm", "pack_dtype": "int32"}),
    ("awq", {"desc_act": False, "lm_head": False, "sym": False, "meta": {"any": 1}}),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "changes"), DESCRIPTIVE, ids=lambda value: str(value)[:60])
def test_what_only_describes_is_passed_over(folders, layout, changes):
    metadata = read(folders, layout, changes)
    assert metadata.packing(next(t for t in metadata.tensors if t.prefix == W2))


def test_the_first_of_two_groups_that_names_a_module_is_its_group(folders):
    groups = {
        "wide": {"targets": ["Linear"], "weights": {"num_bits": 8}},
        "named": {**COMPRESSED["config_groups"]["group_0"], "targets": [r"re:.*_proj", "re:.*w"]},
    }
    read(folders, "compressed", {"config_groups": groups})
    groups["named"]["targets"] = ["re:.*_proj"]
    with pytest.raises(QmixError, match=r"wide\.weights\.num_bits: contradicts.*expected 4, as"):
        read(folders, "compressed", {"config_groups": groups})


def damaged(tmp_path, pack, settings, suffix, edit, **options):
    """The error of a checkpoint whose tensor W2 + suffix was edited."""
    packers.checkpoint(tmp_path, pack, settings, **options)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[W2 + suffix] = edit(tensors[W2 + suffix].clone())
    save_file(tensors, path)
    checkpoint = open_checkpoint(tmp_path)
    tensor = next(tensor for tensor in checkpoint.tensors if tensor.prefix == W2)
    with pytest.raises(QmixError) as caught:
        checkpoint.weight(tensor)
    assert caught.value.exit_code == 3
    return str(caught.value)


def swapped(index):
    """Two inputs in each other's group."""
    index[[0, 40]] = index[[40, 0]]
    return index


def test_a_table_of_groups_that_is_balanced_but_wrong_is_refused(tmp_path):
    message = damaged(tmp_path, packers.gptq, GPTQ, ".g_idx", swapped)
    assert f"{W2}.g_idx: inputs are scattered over groups" in message
    assert "from input 0 on" in message


def test_zeros_are_refused_where_zero_point_is_false(tmp_path):
    settings = {**AWQ, "zero_point": False}
    message = damaged(tmp_path, packers.awq, settings, ".qzeros", lambda zeros: zeros + 1)
    assert f"{W2}.qzeros: zeros, though zero_point of the settings is false" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("pack", "settings", "suffix"),
    [
        (packers.gptq, GPTQ, ".scales"),
        (packers.awq, AWQ, ".scales"),
        (packers.compressed, COMPRESSED, ".weight_scale"),
    ],
    ids=["gptq", "awq", "compressed"],
)
def test_scales_that_are_no_numbers_are_refused(tmp_path, pack, settings, suffix, value):
    def edit(scales):
        scales[1, 1] = value
        return scales

    message = damaged(tmp_path, pack, settings, suffix, edit)
    assert f"{W2}{suffix}: holds NaN or infinity" in message


@pytest.mark.parametrize("suffix", [".scales", ".qweight", ".qzeros"])
def test_a_tensor_without_dimensions_is_refused(tmp_path, suffix):
    message = damaged(tmp_path, packers.gptq, GPTQ, suffix, lambda t: t.view(-1)[0].clone())
    assert f"{W2}{suffix}: wrong shape" in message
