"""GPTQ's settings: read strictly, and written so that vLLM, gptqmodel and qmix agree on them."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.layouts import gptq_config
from qmix.formats.names import spellings
from qmix.weights.scheme import DENSE, Scheme
from tests.support.packers import ATTENTION, LAYERS, MATRICES, MODULES, ROUTERS, uniform

INT4, INT8 = Scheme(kind="int4"), Scheme(kind="int8")


def read(config):
    return gptq_config.parse(json.loads(json.dumps(config)), "config.json")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (None, (1, True, None)),
        ({}, (1, True, None)),
        ({"bits": [4], "group_size": [128], "sym": [True], "desc_act": [True]}, (1, True, 128)),
        ({"bits": 4, "group_size": -1, "sym": False}, (1, False, -1)),
        ({"checkpoint_format": "gptq_v2", "bits": 4}, (2, True, None)),
        ({"checkpoint_format": "gptq", "format": "gptq", "quant_method": "gptq"}, (1, True, None)),
        ({"group_size": 128, "dynamic": {"-:.*gate": {}}}, (1, True, 128)),
        ({"bits": 8, "dynamic": None}, (1, True, None)),
        ({"group_size": 128, "dynamic": {}}, (1, True, 128)),
        ({"checkpoint_format": None, "format": "gptq_v2"}, (2, True, None)),
        ({"is_marlin_format": False, "model_name_or_path": None}, (1, True, None)),
    ],
)
def test_the_settings_that_files_have(document, expected):
    found = gptq_config.parse(document, "x.json")
    assert (found.version, found.symmetric, found.group_size) == expected


@pytest.mark.parametrize(
    ("document", "kind", "named"),
    [
        ({"bits": 5}, UnsupportedError, "bits.*2, 3, 4 or 8 bits only.*found 5"),
        ({"bits": "4"}, UnsupportedError, "bits"),
        ({"bits": True}, UnsupportedError, "bits"),
        ({"bits": [4, 8]}, UnsupportedError, "bits"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "marlin format"),
        ({"checkpoint_format": 2}, UnsupportedError, "in the 2 format is not read; expected gptq or gptq_v2"),
        ({"is_marlin_format": True}, UnsupportedError, "marlin"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, CheckpointError, "differ"),
        ({"quant_method": "awq"}, CheckpointError, "quant_method.*expected 'gptq'; found 'awq'"),
        ({"group_size": 48}, CheckpointError, "group_size: unknown group size.*-1 or one of 32, 64, 128; found 48"),
        ({"group_size": 0}, CheckpointError, "group_size"),
        ({"group_size": 128.0}, CheckpointError, "group_size"),
        ({"sym": 1}, CheckpointError, "sym.*true or false"),
        ({"lm_head": "no"}, CheckpointError, "lm_head.*true or false"),
        ({"dynamic": [1, 2]}, CheckpointError, "dynamic: not a table of rules"),
        ({"dynamic": {str(i): {} for i in range(5000)}}, CheckpointError, "found 5,000 rules"),
        ({"dynamic": {"a": None}}, CheckpointError, "dynamic: a: wrong type; expected an object"),
        ({"dynamic": {"+:a(": {}}}, CheckpointError, r"dynamic: \+:a\(: not a regular expression"),
        ({"dynamic": {"a": {"bits": "8"}}}, CheckpointError, "dynamic: a: wrong bits"),
        ({"dynamic": {"a": {"bits": 16}}}, CheckpointError, "dynamic: a: wrong bits; expected 2 to 8"),
        ({"dynamic": {"a": {"sym": 0}}}, CheckpointError, "dynamic: a: sym: wrong type"),
        ({"dynamic": {"a": {"group_size": 7}}}, CheckpointError, "dynamic: a: group_size"),
        ({"dynamic": {r"(\w+\.?)+x": {}}}, UnsupportedError, "too intricate"),
        ({"dynamic": {r"(a|b){40}": {}}}, UnsupportedError, "too intricate"),
        ({"dynamic": {".*.*.*.*.*x": {}}}, UnsupportedError, "too intricate"),
        ({"dynamic": {r"(.*)\1x": {}}}, UnsupportedError, "too intricate"),
        ({"dynamic": {"a?" * 30: {}}}, UnsupportedError, "too intricate"),
    ],
)  # fmt: skip
def test_settings_that_are_not_read_are_refused(document, kind, named):
    with pytest.raises(kind, match=named) as caught:
        gptq_config.parse(document, "x.json")
    assert str(caught.value).startswith("x.json")


def test_the_settings_written_are_those_that_vllm_demands():
    config = gptq_config.quantization_config(uniform(INT4))
    assert config == {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "dynamic": {}, "group_size": 128,
        "lm_head": False, "quant_method": "gptq", "sym": True,
    }  # fmt: skip
    assert read(config).group_size == 128
    wide = gptq_config.quantization_config(uniform(INT8), version=2, act_order=True)
    assert (wide["bits"], wide["checkpoint_format"], wide["desc_act"]) == (8, "gptq_v2", True)


def test_the_rules_of_usual_recipes_are_short():
    dense = gptq_config.quantization_config(uniform(INT4, attention=DENSE))
    assert dense["dynamic"] == {r"-:model\.layers\.\d+\.self_attn\..*": {}}
    wide = gptq_config.quantization_config(uniform(INT4, attention=INT8))
    assert wide["dynamic"] == {r"+:model\.layers\.\d+\.self_attn\..*": {"bits": 8}}
    last = Scheme(kind="int4", group_size=32)
    experts = {name: last for name in MATRICES if ".2." in name[:16] or ".0." in name[:16]}
    assert gptq_config.quantization_config(uniform(INT4) | experts)["dynamic"] == {
        r"+:model\.layers\.(0|2)\.(block_sparse_moe|mlp)\.experts(\..*)?$": {"group_size": 32}
    }
    one = {"model.layers.1.block_sparse_moe.experts.3.w2": INT8}
    assert gptq_config.quantization_config(uniform(INT4) | one)["dynamic"] == {
        r"+:model\.layers\.1\.(block_sparse_moe|mlp)\.experts\.3\.(w2|down_proj)$": {"bits": 8}
    }
    w2 = {name: INT8 for name in MATRICES if name.endswith("w2")}
    assert gptq_config.quantization_config(uniform(INT4) | w2)["dynamic"] == {
        r"+:model\.layers\.\d+\.(block_sparse_moe|mlp)\.experts\.\d+\.(w2|down_proj)$": {"bits": 8}
    }


def first_match(dynamic, name):
    """What gptqmodel 7.7 (`dynamic_get`) and vLLM 0.33 (`get_dynamic_override`) return."""
    for pattern, overrides in dynamic.items():
        if pattern.startswith("-:"):
            if re.match(pattern.removeprefix("-:"), name):
                return False
        elif re.match(pattern.removeprefix("+:"), name):
            return overrides
    return None


def theirs(config, name):
    """The scheme by those rules; None where the module is not quantized."""
    found = first_match(config["dynamic"], name)
    if found is False:
        return DENSE
    fields = {**config, **(found or {})}
    kind = {4: "int4", 8: "int8"}[fields["bits"]]
    return Scheme(kind=kind, group_size=fields["group_size"], symmetric=fields["sym"])


SCHEMES = st.sampled_from(
    [INT4, INT8, DENSE, Scheme(kind="int4", group_size=32), Scheme(kind="int8", group_size=-1),
     Scheme(kind="int4", symmetric=False), Scheme(kind="int8", group_size=64, symmetric=False)]
)  # fmt: skip


@st.composite
def recipes(draw):
    """Schemes of all modules, by layer, by matrix or one by one; at least one has integers."""
    base = draw(SCHEMES.filter(lambda scheme: scheme.integer))
    chosen = uniform(base, attention=draw(SCHEMES))
    for layer in range(LAYERS):
        if draw(st.booleans()):
            chosen |= {
                m: draw(SCHEMES) for m in ATTENTION if m.startswith(f"model.layers.{layer}.")
            }
        if draw(st.booleans()):
            scheme = draw(SCHEMES)
            chosen |= {m: scheme for m in MATRICES if m.startswith(f"model.layers.{layer}.")}
    for module in draw(st.lists(st.sampled_from(MODULES), max_size=6, unique=True)):
        chosen[module] = draw(SCHEMES)
    chosen[MATRICES[0]] = base
    return chosen


@given(recipes())
def test_the_settings_alone_say_the_scheme_of_each_module(schemes):
    config = gptq_config.quantization_config(schemes)
    found = read(config)
    assert {module: found.scheme_of(module) for module in schemes} == schemes
    # gptqmodel and vLLM agree, in both dialects; the router and the head are theirs to decide.
    for module in (*ATTENTION, *MATRICES):
        for name in spellings(module):
            assert theirs(config, name) == schemes[module], name
    # vLLM asks by the names of what it fuses.
    for layer in range(LAYERS):
        fused = {
            f"model.layers.{layer}.block_sparse_moe.experts": MATRICES,
            f"model.layers.{layer}.self_attn.qkv_proj": ATTENTION,
        }
        for name, modules in fused.items():
            own = {
                schemes[m]
                for m in modules
                if m.startswith(f"model.layers.{layer}.") and not m.endswith("o_proj")
            }
            if len(own) == 1:
                assert {theirs(config, name)} == own


def test_what_the_settings_do_not_say_is_none():
    assert read({"bits": 4}).scheme_of(MATRICES[0]) is None
    assert read({"group_size": 128}).scheme_of(MATRICES[0]) is None
    said = read({"bits": 4, "group_size": 128, "dynamic": {MATRICES[0]: {"bits": 5}}})
    assert said.scheme_of(MATRICES[0]) is None
    assert said.scheme_of(MATRICES[1]) == INT4
    assert said.scheme_of("lm_head") == said.scheme_of(ROUTERS[0]) == DENSE


def test_a_rule_matches_from_the_start_and_the_first_one_wins():
    rules = {"model.layers.1": {"bits": 8}, r"-:model\.layers\.\d+": {}, "layers": {"bits": 8}}
    said = read({"bits": 4, "group_size": 128, "dynamic": rules})
    assert said.scheme_of("model.layers.1.self_attn.q_proj") == INT8
    assert said.scheme_of("model.layers.11.self_attn.q_proj") == INT8
    assert said.scheme_of("model.layers.2.self_attn.q_proj") == DENSE
