"""`qmix export` to every format: the same numbers to the bit, or a refusal by kind, or errors."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from qmix.commands.checkpoint.export import export_checkpoint
from qmix.commands.checkpoint.verify import verify
from qmix.errors import CheckpointError, UnsupportedError, UsageError
from qmix.formats import open_checkpoint
from qmix.formats.files import manifest
from qmix.gguf.files import read_model
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.streaming import quantize_streaming
from qmix.text.tokenizer import LlamaTokenizer
from qmix.weights.dense import Dense
from qmix.weights.scheme import NF4, Recipe
from tests.support import packers
from tests.support.gguf_files import GOLDEN, write_mixtral
from tests.support.golden import MLX
from tests.support.models import ids, small_model
from tests.support.packers import AWQ, GPTQ, MIXED, dense_values
from tests.support.process import qmix
from tests.support.small_tokenizer import add_tokenizer, small_tokenizer

EXPERT = "model.layers.0.block_sparse_moe.experts.0.w1"
CT_MXFP4 = GOLDEN / "compressed-tensors-0.20.0" / "mxfp4"


def powers(weight, prefix):
    """GPTQ with scales that are powers of two: a zero times such a scale is exact in 16 bits."""
    return packers.gptq(replace(weight, scales=torch.full_like(weight.scales, 2.0**-7)), prefix)


# Of each source: its packer, settings and options, and the formats that hold it exactly.
ALL = {"gptq", "awq", "compressed-tensors", "mlx", "gguf"}
SOURCES = {
    "symmetric": (packers.gptq, GPTQ, {}, ALL),
    "groups of 64": (packers.gptq, {**GPTQ, "group_size": 64}, {"group": 64}, ALL),
    "per output": (packers.gptq, {**GPTQ, "group_size": -1}, {"group": -1}, ALL),
    "bfloat16 scales": (packers.gptq, GPTQ, {"dtype": torch.bfloat16}, ALL),
    "dense attention": (packers.gptq, GPTQ, {"dense": ("gate", "lm_head", "_proj")}, ALL),
    "router and head": (packers.gptq, GPTQ, {"dense": ("none",), "experts": 8}, ALL),
    "8 bits": (packers.gptq, {**GPTQ, "bits": 8}, {"bits": 8}, ALL - {"awq"}),
    "mixed": (packers.gptq, {**GPTQ, **MIXED}, {"own": packers.own}, ALL - {"awq"}),
    "zeros": (packers.awq, AWQ, {"symmetric": False}, {"gptq", "awq"}),
    "a zero of 0": (packers.awq, AWQ, {"symmetric": False, "low": 0}, {"awq"}),
    "act-order": (packers.gptq, {**GPTQ, "desc_act": True}, {"act_order": True}, {"gptq"}),
    "act-order, per output": (
        packers.gptq,
        {**GPTQ, "group_size": -1, "desc_act": True},
        {"group": -1, "act_order": True},
        ALL,
    ),
    "zeros and powers of two": (
        powers,
        {**GPTQ, "sym": False},
        {"symmetric": False},
        {"gptq", "awq", "mlx", "gguf"},
    ),
}
EXACT = [(name, layout) for name in SOURCES for layout in sorted(SOURCES[name][3])]
# What stands in the way of each source in the formats that do not hold it.
LOSSES = {
    ("8 bits", "awq"): "codes of 8 bits",
    ("mixed", "awq"): "codes of 8 bits",
    ("zeros", "compressed-tensors"): "zeros",
    ("zeros", "mlx"): "zeros that float16 or bfloat16 does not hold",
    ("zeros", "gguf"): "zeros that float16 does not hold",
    ("a zero of 0", "gptq"): "zeros below 1",
    ("act-order", "awq"): "act-order",
    ("act-order", "mlx"): "act-order",
    ("act-order", "gguf"): "act-order",
    ("zeros and powers of two", "compressed-tensors"): "zeros",
} | {(name, "nf4"): "integers in a layout of tables" for name in ("symmetric", "8 bits")}


def write(folder, name):
    pack, settings, options, _ = SOURCES[name]
    packers.checkpoint(folder, pack, settings, **options)
    add_tokenizer(folder)
    return folder


def assert_equal(first, second):
    ours, theirs = dense_values(first), dense_values(second)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.diagonal
@pytest.mark.parametrize(("name", "layout"), EXACT)
def test_what_a_format_holds_is_the_same_there_and_back(tmp_path, name, layout):
    source, there, back = write(tmp_path / "in", name), tmp_path / "out", tmp_path / "back"
    result = export_checkpoint(source, there, layout)
    assert (result.rounded, result.losses) == ((), ())
    assert not (there / manifest.REPORT).exists()
    assert_equal(source, there)
    assert verify(there).problems == ()
    if "awq" in SOURCES[name][3]:
        export_checkpoint(there, back, "awq")
        assert_equal(source, back)
        assert open_checkpoint(back).config.quantization_config["version"] == "gemm"


@pytest.mark.parametrize(("name", "layout"), LOSSES)
def test_a_loss_is_refused_by_kind_and_nothing_is_written(tmp_path, name, layout):
    source = write(tmp_path / "in", name)
    with pytest.raises(UnsupportedError, match=f"{LOSSES[name, layout]}: .*--requantize"):
        export_checkpoint(source, tmp_path / "out", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("name", "layout"), LOSSES)
def test_the_errors_of_rounding_are_those_of_the_files(tmp_path, name, layout):
    source, out = write(tmp_path / "in", name), tmp_path / "out"
    result = export_checkpoint(source, out, layout, requantize=True)
    before, after = dense_values(source), dense_values(out)
    report = json.loads((out / manifest.REPORT).read_text())
    assert len(report["tensors"]) == len(result.rounded) > 0
    error = norm = 0.0
    for entry in report["tensors"]:
        exact, found = (part[f"{entry['name']}.weight"].double() for part in (before, after))
        error += float((exact - found).pow(2).sum())
        norm += float(exact.pow(2).sum())
        relative = float((exact - found).norm() / exact.norm())
        assert entry["relative_error"] == pytest.approx(relative, rel=1e-4)
        assert entry["largest_error"] == pytest.approx(float((exact - found).abs().max()), rel=1e-4)
        assert entry["loss"] == LOSSES[name, layout]
    assert report["relative_error"] == pytest.approx((error / norm) ** 0.5, rel=1e-4)
    assert result.relative_error == report["relative_error"]
    limit = 1e-3 if "does not hold" in LOSSES[name, layout] else 0.15
    assert 0 < result.relative_error < limit
    rounded = {f"{weight.name}.weight" for weight in result.rounded}
    for other in before.keys() - rounded:
        assert torch.equal(before[other], after[other]), other
    assert verify(out).problems == ()


def nf4(folder, double_quant):
    source = folder.with_name("dense")
    small_model(num_hidden_layers=1, num_local_experts=2).bfloat16().save_pretrained(source)
    recipe = Recipe.uniform(replace(NF4, double_quant=double_quant), attention=True)
    quantize_streaming(source, folder, recipe, method="nf4")
    return folder


@pytest.mark.parametrize("double_quant", [True, False])
def test_tables_stay_tables_in_bitsandbytes_layout_only(tmp_path, double_quant):
    source = nf4(tmp_path / "in", double_quant)
    export_checkpoint(source, tmp_path / "out", "nf4")
    assert_equal(source, tmp_path / "out")
    settings = [open_checkpoint(f).config.quantization_config for f in (source, tmp_path / "out")]
    assert settings[0] == settings[1]
    with pytest.raises(UnsupportedError, match=r"codes of a table \(nf4\) in an affine layout: 10"):
        export_checkpoint(source, tmp_path / "other", "gptq")
    result = export_checkpoint(source, tmp_path / "other", "gptq", requantize=True)
    assert 0.05 < result.relative_error < 0.15


def test_mlx_experts_are_stacked_and_the_config_has_both_fields(tmp_path):
    source = write(tmp_path / "in", "mixed")
    export_checkpoint(source, tmp_path / "out", "mlx")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "mlx"}
        names = set(opened.keys())
        stack = opened.get_tensor("model.layers.1.block_sparse_moe.switch_mlp.up_proj.scales")
    assert stack.shape[0] == 4
    assert not any(".experts." in name for name in names)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    settings = document["quantization"]
    assert settings == document["quantization_config"]
    assert {name: settings[name] for name in ("bits", "group_size", "mode")} == {
        "bits": 4,
        "group_size": 32,
        "mode": "affine",
    }
    own = settings["model.layers.0.self_attn.q_proj"]
    assert (own["bits"], own["group_size"]) == (8, 64)


FP4 = {"mxfp4": MLX / "mxfp4", "nvfp4": MLX / "nvfp4", "pack-quantized": CT_MXFP4}


@pytest.mark.parametrize("name", FP4)
def test_fp4_with_scales_of_one_byte_is_mlxs_too(tmp_path, name):
    export_checkpoint(FP4[name], tmp_path / "out", "mlx")
    assert_equal(FP4[name], tmp_path / "out")
    mode = open_checkpoint(tmp_path / "out").config.quantization_config["mode"]
    assert mode == ("nvfp4" if name == "nvfp4" else "mxfp4")


def test_no_field_of_mlx_is_left_in_another_format(tmp_path):
    result = export_checkpoint(MLX / "affine4", tmp_path / "out", "gptq", requantize=True)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in document
    assert [str(note).split(":")[0] for note in result.notes] == [
        "an embedding in codes, where the format has 16 bits"
    ]


def test_codes_of_5_and_6_bits_that_become_8_are_counted(tmp_path):
    result = export_checkpoint(MLX / "mixed", tmp_path / "out", "mlx")
    (note,) = result.notes
    assert (note.what, note.weights) == ("codes of 5 or 6 bits take 8 bits there", 3)


def test_one_weight_that_awq_does_not_hold_changes_no_other(tmp_path):
    result = export_checkpoint(MLX / "affine4", tmp_path / "out", "awq", requantize=True)
    lost = {weight.name: weight.loss for weight in result.rounded}
    assert set(lost.values()) == {"free biases", "widths that fill no whole words"}
    before, after = dense_values(MLX / "affine4"), dense_values(tmp_path / "out")
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == (name.removesuffix(".weight") not in lost), name


def test_experts_of_one_stack_share_a_form(tmp_path):
    """One symmetric expert among others with zeros: Q4_1 holds both, Q4_0 only the one."""

    def own(prefix):
        return {"symmetric": prefix == EXPERT}

    settings = {**GPTQ, "sym": False}
    packers.checkpoint(tmp_path / "in", powers, settings, own=own)
    add_tokenizer(tmp_path / "in")
    for layout in ("gguf", "mlx"):
        export_checkpoint(tmp_path / "in", tmp_path / layout, layout)
        assert_equal(tmp_path / "in", tmp_path / layout)


def test_a_gguf_file_carries_config_tokenizer_and_template(tmp_path):
    source = write(tmp_path / "in", "symmetric")
    template = "{{ messages }}"
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    export_checkpoint(source, tmp_path / "out", "gguf")
    model = read_model(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.gguf",
        "qmix_manifest.json",
    ]
    assert model.metadata["tokenizer.chat_template"] == template
    assert model.metadata["general.file_type"] == 2
    assert model.tensors["blk.0.ffn_up_exps.weight"][1].type == "Q4_0"
    assert model.tensors["blk.0.ffn_gate_inp.weight"][1].type == "F32"
    ours, theirs = (open_checkpoint(f).config for f in (source, tmp_path / "out"))
    for field in ("hidden_size", "rope_theta", "rms_norm_eps", "vocab_size", "head_dim"):
        assert getattr(ours, field) == getattr(theirs, field), field
    tokenizers = [LlamaTokenizer.from_pretrained(f) for f in (source, tmp_path / "out")]
    assert tokenizers[0].encode("a word 12") == tokenizers[1].encode("a word 12")
    logits = [
        MixtralForCausalLM.from_pretrained(f, dtype="float32", device="cpu")(ids(8)).logits
        for f in (source, tmp_path / "out")
    ]
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_a_dense_model_becomes_gguf_as_it_is(tmp_path):
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        source = tmp_path / kind
        small_model(tie_word_embeddings=kind == "F16").to(dtype).save_pretrained(source)
        size = open_checkpoint(source).config.vocab_size
        (source / "tokenizer.model").write_bytes(small_tokenizer(size - 1))
        export_checkpoint(source, tmp_path / f"{kind}-out", "gguf")
        assert_equal(source, tmp_path / f"{kind}-out")
        model = read_model(tmp_path / f"{kind}-out")
        assert model.tensors["blk.0.attn_q.weight"][1].type == kind
        assert model.metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{size - 1}]"


def test_gguf_files_of_2023_become_stacked_ones(tmp_path):
    old = write_mixtral(tmp_path / "old.gguf", small_model().half().float(), stacked=False)
    export_checkpoint(old, tmp_path / "out", "gguf")
    assert_equal(old, tmp_path / "out")
    assert "blk.0.ffn_down_exps.weight" in read_model(tmp_path / "out").tensors


def test_k_quants_are_copied_from_file_to_file_and_rounded_elsewhere(tmp_path):
    source = GOLDEN / "gguf-Q4_K_M.gguf"
    result = export_checkpoint(source, tmp_path / "out", "gguf")
    assert result.rounded == ()
    assert_equal(source, tmp_path / "out")
    kinds = [{name: t.type for name, (_, t) in read_model(f).tensors.items()} for f in
             (source, tmp_path / "out")]  # fmt: skip
    assert kinds[0] == kinds[1]
    with pytest.raises(UnsupportedError, match=r"an embedding in codes.*nested scales: 11 weights"):
        export_checkpoint(source, tmp_path / "gptq", "gptq")
    export_checkpoint(source, tmp_path / "gptq", "gptq", requantize=True)
    checkpoint = open_checkpoint(tmp_path / "gptq")
    head = next(tensor for tensor in checkpoint.tensors if tensor.kind == "head")
    assert isinstance(checkpoint.weight(head), Dense)
    tokenizers = [LlamaTokenizer.from_pretrained(f) for f in (source, tmp_path / "gptq")]
    assert tokenizers[0].encode("1 and 20") == tokenizers[1].encode("1 and 20")


def test_gguf_needs_the_models_own_tokenizer(tmp_path):
    source = write(tmp_path / "in", "symmetric")
    (source / "tokenizer.model").write_bytes(small_tokenizer(512))
    with pytest.raises(CheckpointError, match="more tokens than the model"):
        export_checkpoint(source, tmp_path / "out", "gguf")
    (source / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        export_checkpoint(source, tmp_path / "out", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_out_is_a_folder_and_no_file(tmp_path):
    source = write(tmp_path / "in", "symmetric")
    with pytest.raises(UsageError, match=r"OUT is a folder.*Give .*/model\."):
        export_checkpoint(source, tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_command_says_what_is_lost_and_then_how_much(tmp_path):
    source = write(tmp_path / "in", "zeros")
    command = ("export", source, tmp_path / "out", "--to", "mlx")
    refused = qmix(*command)
    assert refused.returncode == 3
    assert "zeros that float16 or bfloat16 does not hold: 32 weights" in refused.stderr
    done = qmix(*command, "--requantize")
    assert done.returncode == 0, done.stderr
    assert "relative error of the rounded weights" in done.stderr
    assert "32 weights, 32 of them rounded" in done.stderr
