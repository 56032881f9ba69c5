"""`qmix export --for PROGRAM`: what the program loads, or why nothing does and what would."""

from functools import partial

import pytest
import torch

from qmix.commands.checkpoint.export_for import export_for
from qmix.commands.checkpoint.inspect import inspect
from qmix.errors import UnsupportedError
from tests.support import packers
from tests.support.golden import MLX
from tests.support.models import small_model
from tests.support.packers import AWQ, MIXED, dense_values
from tests.support.process import qmix
from tests.support.small_tokenizer import add_tokenizer


def experts_of_8_bits(prefix):
    return {"bits": 8} if "layers.1.block" in prefix else {}


GPTQ = {**packers.GPTQ, "desc_act": False}
EXPERT_RULES = {**GPTQ, "dynamic": {r"model\.layers\.1\.block_sparse_moe\.experts.*": {"bits": 8}}}
# Packer, settings, options, and what is written for vLLM, SGLang, transformers and llama.cpp; or
# a word of why nothing is.
SOURCES = {
    "symmetric": (packers.gptq, GPTQ, {}, ("gptq", "gptq", "compressed-tensors", "gguf")),
    "8 bits": (
        packers.gptq,
        {**GPTQ, "bits": 8},
        {"bits": 8},
        ("gptq", "gptq", "compressed-tensors", "gguf"),
    ),
    "groups of 64": (
        packers.gptq,
        {**GPTQ, "group_size": 64},
        {"group": 64},
        ("gptq", "gptq", "compressed-tensors", "gguf"),
    ),
    "compressed": (
        packers.compressed,
        None,
        {},
        ("compressed-tensors", "compressed-tensors", "compressed-tensors", "gguf"),
    ),
    "zeros": (packers.awq, AWQ, {"symmetric": False}, ("awq", "awq", "zeros", "zeros")),
    "act-order": (
        packers.gptq,
        {**GPTQ, "desc_act": True},
        {"act_order": True},
        ("dropped act-order", "gptq", "act-order", "act-order"),
    ),
    "experts of two widths": (
        packers.gptq,
        EXPERT_RULES,
        {"own": experts_of_8_bits},
        ("gptq", "compressed-tensors", "unpacks all experts by one group", "gguf"),
    ),
    "8-bit attention": (
        packers.gptq,
        {**GPTQ, **MIXED},
        {"own": packers.own},
        ("gptq", "gptq", "compressed-tensors", "gguf"),
    ),
}
PROGRAMS = ("vllm", "sglang", "transformers", "llama.cpp")
CASES = [(name, program) for name in SOURCES for program in PROGRAMS]


def write(folder, name):
    pack, settings, options, _ = SOURCES[name]
    packers.checkpoint(folder, pack, settings, **options)
    add_tokenizer(folder)
    return folder


@pytest.mark.diagonal
@pytest.mark.parametrize(("name", "program"), CASES)
def test_it_is_loaded_and_every_bit_is_kept_or_the_reason_is_said(tmp_path, name, program):
    source, out = write(tmp_path / "in", name), tmp_path / "out"
    expected = SOURCES[name][3][PROGRAMS.index(program)]
    if expected not in ("gptq", "awq", "compressed-tensors", "gguf"):
        with pytest.raises(UnsupportedError) as raised:
            export_for(source, out, program)
        assert expected in raised.value.found
        assert [path.name for path in tmp_path.iterdir()] == ["in"]
        if "--requantize" in raised.value.remedy:
            export_for(source, out, program, requantize=True)
            assert inspect(out).support_of(program).outcome == "loads"
        else:
            with pytest.raises(UnsupportedError):
                export_for(source, out, program, requantize=True)
        return
    written, result = export_for(source, out, program)
    assert (written, result.rounded) == (expected, ())
    assert inspect(out).support_of(program).outcome == "loads"
    before, after = dense_values(source), dense_values(out)
    for tensor, value in before.items():
        assert torch.equal(value, after[tensor]), tensor


def test_router_and_head_are_written_dense_for_a_server(tmp_path):
    """vLLM and SGLang build the router without quantization, SGLang the head too."""
    settings = {**GPTQ, "lm_head": True}
    packers.checkpoint(tmp_path / "in", packers.gptq, settings, dense=("none",), experts=8)
    for program in ("vllm", "sglang"):
        assert inspect(tmp_path / "in").support_of(program).outcome == "refuses"
    export_for(tmp_path / "in", tmp_path / "out", "sglang")
    found = inspect(tmp_path / "out")
    assert {group.kind for group in found.groups if group.quantized} == {"attention", "expert"}


def test_codes_of_mlx_are_rounded_only_if_that_is_asked(tmp_path):
    for program in PROGRAMS[:3]:
        with pytest.raises(UnsupportedError, match=r"free biases.*--requantize rounds"):
            export_for(MLX / "affine4", tmp_path / program, program)
        export_for(MLX / "affine4", tmp_path / program, program, requantize=True)
        assert inspect(tmp_path / program).support_of(program).outcome == "loads"


def test_16_bits_need_no_export_but_for_llama_cpp(tmp_path):
    small_model().bfloat16().save_pretrained(tmp_path / "in")
    add_tokenizer(tmp_path / "in")
    write_for = partial(export_for, tmp_path / "in", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="SGLang loads this folder as it is, in 16 bits"):
        write_for("sglang")
    assert write_for("llama.cpp")[0] == "gguf"


def test_sglang_takes_heads_of_the_usual_width_only(tmp_path):
    packers.checkpoint(tmp_path, packers.gptq, GPTQ)
    usual = inspect(tmp_path)
    assert usual.support_of("sglang").outcome == "loads"
    model = small_model(head_dim=2 * usual.config.head_dim)
    model.save_pretrained(tmp_path / "wide")
    assert "head_dim" in inspect(tmp_path / "wide").support_of("sglang").reason
    assert inspect(tmp_path / "wide").support_of("vllm").outcome == "loads"


def test_the_commands_say_how_to_serve_and_where_the_rules_stand(tmp_path):
    source, out = write(tmp_path / "in", "act-order"), tmp_path / "out"
    done = qmix("export", source, out, "--for", "sglang")
    assert done.returncode == 0
    assert (
        f"gptq, for SGLang 0.5.23: python -m sglang.launch_server --model-path {out}" in done.stderr
    )
    said = qmix("inspect", source, "--for", "vllm")
    assert said.stdout.startswith("vLLM 0.33 refuses: it dropped act-order")
    assert "https://github.com/vllm-project/vllm/tree/v0.33.0" in said.stdout
    for options in ((), ("--for", "vllm", "--format", "gptq")):
        refused = qmix("export", source, tmp_path / "other", *options)
        assert refused.returncode == 2
        assert "--for PROGRAM or --format FORMAT" in refused.stderr
