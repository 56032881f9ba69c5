"""One layout for each kind of weight: what is saved is what was loaded, and the config says so."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qmix.errors import UnsupportedError
from qmix.formats.layouts import gptq, gptq_config, writer
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.weights.affine import Affine, pack_codes
from qmix.weights.dense import Dense
from qmix.weights.nf4 import quantize
from qmix.weights.scheme import DENSE, NF4, Scheme
from tests.support import packers
from tests.support.models import small_model
from tests.support.packers import MATRICES, MODULES, equal, plain, uniform

P = "model.layers.1.block_sparse_moe.experts.3.w2"
INT4, INT8 = Scheme(kind="int4", group_size=32), Scheme(kind="int8", group_size=32)


def load(folder):
    return MixtralForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")


def saved(folder):
    document = json.loads((folder / "config.json").read_text())
    return document.get("quantization_config")


GPTQ = {"bits": 4, "group_size": 32, "sym": True, "quant_method": "gptq"}
SOURCES = {
    "gptq": (packers.gptq, GPTQ, {}),
    "gptq asymmetric": (packers.gptq, {**GPTQ, "sym": False}, {"symmetric": False}),
    "gptq zero of 0": (packers.gptq, {**GPTQ, "sym": False}, {"symmetric": False, "low": 0}),
    "gptq act-order": (packers.gptq, {**GPTQ, "desc_act": True}, {"act_order": True}),
    "gptq per output": (packers.gptq, {**GPTQ, "group_size": -1}, {"group": -1}),
    "gptq 8 bits": (packers.gptq, {**GPTQ, "bits": 8}, {"bits": 8}),
    "gptq 8 bits, all of it": (
        packers.gptq,
        {**GPTQ, "bits": 8, "sym": False, "desc_act": True},
        {"bits": 8, "symmetric": False, "low": 0, "act_order": True},
    ),
    "gptq bfloat16": (packers.gptq, GPTQ, {"dtype": torch.bfloat16}),
    "gptq router and head": (packers.gptq, GPTQ, {"dense": ("none",), "experts": 8}),
    "awq": (packers.awq, {"quant_method": "awq", "version": "gemm"}, {"symmetric": False}),
    "awq zero of 0": (packers.awq, {"quant_method": "awq"}, {"symmetric": False, "low": 0}),
    "compressed": (packers.compressed, {"quant_method": "compressed-tensors"}, {}),
    "compressed 8 bits": (packers.compressed, {"quant_method": "compressed-tensors"}, {"bits": 8}),
    "mixed": (
        packers.gptq,
        {**GPTQ, "dynamic": {rf"{P}$": {"bits": 8, "group_size": 64, "sym": False}}},
        {"own": lambda p: {"bits": 8, "group": 64, "symmetric": False} if p == P else {}},
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_saving_keeps_every_bit_and_the_config_says_how(tmp_path, name):
    pack, settings, options = SOURCES[name]
    packers.checkpoint(tmp_path / "in", pack, settings, **options)
    model = load(tmp_path / "in")
    model.save_pretrained(tmp_path / "out")
    schemes = equal(tmp_path / "in", tmp_path / "out")
    written = saved(tmp_path / "out")
    assert written["quant_method"] == "gptq"
    said = gptq_config.parse(written, "config.json")
    assert {module: said.scheme_of(module) for module in schemes} == schemes
    assert written["desc_act"] == bool(options.get("act_order"))
    assert written["checkpoint_format"] == ("gptq_v2" if options.get("low") == 0 else "gptq")
    # Once more, from its own output: the same bytes.
    load(tmp_path / "out").save_pretrained(tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_true_act_order_keeps_its_index(tmp_path):
    packers.checkpoint(tmp_path / "in", packers.gptq, GPTQ, act_order=True)
    load(tmp_path / "in").save_pretrained(tmp_path / "out")
    before = load_file(tmp_path / "in" / "model.safetensors")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    after = load_file(path)
    assert torch.equal(after[f"{P}.g_idx"], before[f"{P}.g_idx"])
    assert torch.equal(after[f"{P}.qweight"], before[f"{P}.qweight"])


def test_a_dense_model_loses_a_stale_quantization_config(tmp_path):
    packers.checkpoint(tmp_path / "in", lambda w, p: {f"{p}.weight": w.meant()}, GPTQ)
    load(tmp_path / "in").save_pretrained(tmp_path / "out")
    assert saved(tmp_path / "out") is None


def experts_of(model):
    return [
        getattr(expert, name)
        for layer in model.model.layers
        for expert in layer.block_sparse_moe.experts
        for name in ("w1", "w2", "w3")
    ]


def integers(bits, shape, seed=0):
    weight = plain(shape, 32, bits=bits, seed=seed)
    codes = pack_codes(torch.tensor(weight.codes, dtype=torch.uint8), bits)
    return Affine(codes, weight.scales, bits=bits)


def test_int4_and_int8_in_one_model(tmp_path):
    model = small_model(intermediate_size=128).bfloat16()
    for index, linear in enumerate(experts_of(model)):
        shape = (linear.out_features, linear.in_features)
        linear.store(integers(8 if index < 24 else 4, shape, index))
    model.save_pretrained(tmp_path / "out")
    schemes = equal(tmp_path / "out", tmp_path / "out")
    assert schemes["model.layers.0.block_sparse_moe.experts.7.w3"] == INT8
    assert schemes["model.layers.2.block_sparse_moe.experts.0.w1"] == INT4
    assert saved(tmp_path / "out")["dynamic"] == {
        r"-:model\.layers\.\d+\.self_attn\..*": {},
        r"+:model\.layers\.0\.(block_sparse_moe|mlp)\.experts(\..*)?$": {"bits": 8},
    }


@pytest.mark.parametrize("there", [False, True])
def test_two_layouts_are_refused_before_a_file_is_written(tmp_path, there):
    model = small_model(intermediate_size=128).bfloat16()
    first, second, *_ = experts_of(model)
    first.store(quantize(first.weight.detach()))
    second.store(integers(4, (second.out_features, second.in_features)))
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(
        UnsupportedError,
        match=r"two layouts .*experts\.0\.w1 is nf4 b64 double-quant and .*experts\.0\.w2 is int4 g32",
    ):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.rglob("*.*"))


def test_what_fills_no_whole_words_is_refused_before_a_file_is_written(tmp_path):
    packers.checkpoint(tmp_path / "in", packers.compressed, None, dense=("lm_head",))
    with pytest.raises(UnsupportedError, match=r"gate: cannot be written as GPTQ.*found 4 and 64"):
        load(tmp_path / "in").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


WEIGHTS = {
    "dense": Dense(torch.ones(16, 64, dtype=torch.bfloat16)),
    "nf4": quantize(torch.ones(16, 64)),
    "int4": integers(4, (16, 64)),
    "int8": integers(8, (16, 64)),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_plan_of_every_kind_is_what_is_packed(kind):
    weight = WEIGHTS[kind]
    specs = writer.packed_specs(P, weight.shape, weight.scheme, weight.dtype)
    packed = writer.pack(weight, P)
    assert [spec.name for spec in specs] == list(packed)
    for spec in specs:
        tensor = packed[spec.name]
        assert tensor.dtype == spec.dtype
        is_bound = "quant_state" in spec.name  # its length is known only afterwards
        assert tensor.shape == spec.shape or (is_bound and tensor.shape < spec.shape)
    if kind != "dense":
        assert writer.layout_of({P: weight.scheme}) == ("bitsandbytes" if kind == "nf4" else "GPTQ")


def test_the_settings_of_each_layout():
    assert writer.quantization_config(uniform(DENSE), torch.float16) is None
    config = writer.quantization_config(uniform(INT4), torch.float16)
    assert config == gptq_config.quantization_config(uniform(INT4))
    config = writer.quantization_config(uniform(NF4), torch.float16)
    assert config["bnb_4bit_compute_dtype"] == "float16"
    assert config["llm_int8_skip_modules"] == ["lm_head", "gate"]
    dense = [f"{x}_proj" for x in "qkvo"]
    config = writer.quantization_config(uniform(NF4, attention=DENSE), torch.float16)
    assert config["llm_int8_skip_modules"] == ["lm_head", "gate", *dense]
    # A single dense expert is named in full, a packed router not at all.
    some = uniform(NF4) | {MATRICES[0]: DENSE} | {m: NF4 for m in MODULES if m.endswith("gate")}
    config = writer.quantization_config(some, torch.float16)
    assert config["llm_int8_skip_modules"] == ["lm_head", MATRICES[0]]
    with pytest.raises(UnsupportedError, match="two layouts"):
        writer.quantization_config(uniform(NF4, attention=INT8), torch.float16)


def test_the_version_is_1_unless_a_zero_is_0():
    tensors = packers.gptq(plain((16, 64), 32, symmetric=False, low=0, seed=1), P)
    said = gptq_config.GPTQConfig(symmetric=False).for_module(P)
    weight = gptq.unpack(tensors, P, "f", (16, 64), said)
    assert {writer.version_of(weight) for weight in WEIGHTS.values()} == {1}
    assert writer.version_of(weight) == 2
    assert not any(map(writer.act_order, [*WEIGHTS.values(), weight]))
    tensors = packers.gptq(plain((16, 64), 32, act_order=True), P)
    weight = gptq.unpack(tensors, P, "f", (16, 64), gptq_config.GPTQConfig().for_module(P))
    assert writer.act_order(weight)
