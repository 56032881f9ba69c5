"""GPTQ of a whole checkpoint: what it writes, what each matrix saw, what it refuses."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from qmix import kernels
from qmix.commands.checkpoint.verify import verify
from qmix.errors import CheckpointError, InterruptedRunError, UnsupportedError, UsageError
from qmix.formats import open_checkpoint
from qmix.formats.files import manifest
from qmix.formats.layouts import gptq_config
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.calibrated.windows import calibration_windows
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.quantize.rounding import gptq
from qmix.weights.dense import Dense
from qmix.weights.scheme import Recipe, Scheme
from tests.support.calibration import (
    EXPERTS,
    INT4,
    LAYERS,
    RECIPE,
    TEXT,
    WINDOW,
    WINDOWS,
    contents,
    run,
    spoil,
    windows,
    write_source,
)
from tests.support.models import small_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path):
    """A bf16 checkpoint with the tiny model's tokenizer."""
    return write_source(tmp_path / "source")


def test_forward_passes_in_bfloat16_as_on_a_gpu_cost_next_to_nothing(source, tmp_path):
    """What is summed and solved stays float32."""
    exact = run(source, tmp_path / "exact", dtype=torch.float32)
    half = run(source, tmp_path / "half", dtype=torch.bfloat16)
    errors = [
        [result.output_error for result in report.tensors if result.output_error is not None]
        for report in (exact, half)
    ]
    assert len(errors[0]) == len(errors[1]) > 0
    assert sum(errors[1]) != sum(errors[0])
    assert sum(errors[1]) == pytest.approx(sum(errors[0]), rel=0.03)


def test_a_whole_checkpoint_by_the_method_of_a_user(source, tmp_path):
    request = QuantizeRequest(method="gptq", group_size=32, samples=4, seqlen=32, device="cpu")
    seen = []
    report = quantize_checkpoint(
        source, tmp_path / "out", request, TEXT, progress=lambda *at: seen.append(at)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert verify(tmp_path / "out").problems == ()
    found = open_checkpoint(tmp_path / "out")
    for tensor in found.tensors:
        if not tensor.linear:
            continue
        rounded = tensor.kind in ("expert", "attention")
        weight = found.weight(tensor)
        assert isinstance(weight, Dense) != rounded, tensor.name
        if rounded:
            assert (weight.scheme, weight.perm) == (INT4, None)
        else:
            assert torch.equal(weight.data, open_checkpoint(source).read(tensor.name))
    settings = found.config.quantization_config
    assert gptq_config.parse(settings, "config.json").scheme_of("model.layers.0.x") == INT4
    assert (settings["desc_act"], settings["sym"]) == (False, True)
    assert json.loads((tmp_path / "out" / gptq_config.FILE).read_text()) == settings
    assert (tmp_path / "out" / "tokenizer.model").is_file()
    dense, ours = (
        MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, device="cpu")
        for folder in (source, tmp_path / "out")
    )
    ids = calibration_windows(TEXT, lambda text: [1, *range(500, 900)], samples=1, seqlen=64).ids
    with torch.no_grad():
        exact, other = (model(input_ids=ids).logits.log_softmax(-1) for model in (dense, ours))
    assert 0 < float((exact.exp() * (exact - other)).sum(-1).mean()) < 0.5
    # Layers in order, never past the end, the checksums last.
    assert seen[-1][0] == "checksums"
    assert all(0 <= done <= total for _, done, total in seen)
    steps = [what for what, _, _ in seen if what.startswith("layer")]
    assert steps == sorted(steps)
    assert {"layer 1 of 2", "layer 2 of 2"} == set(steps)
    assert report.method == "gptq"


def test_the_report_says_what_was_seen_and_done(source, tmp_path):
    report = run(source, tmp_path / "out")
    document = json.loads((tmp_path / "out" / manifest.REPORT).read_text())
    assert {name: document[name] for name in ("method", "parameters", "bytes_out")} == {
        "method": "gptq",
        "parameters": sum(parameter.numel() for parameter in small_model(
            vocab_size=2048, num_hidden_layers=LAYERS, num_local_experts=EXPERTS).parameters()),
        "bytes_out": sum(entry.nbytes for entry in open_checkpoint(tmp_path / "out").shards.entries.values()),
    }  # fmt: skip
    assert len(document["tensors"]) == LAYERS * (4 + 3 * EXPERTS)
    tokens = {entry["name"]: entry["tokens"] for entry in document["tensors"]}
    for layer in range(LAYERS):
        base = f"model.layers.{layer}"
        assert {tokens[f"{base}.self_attn.{x}_proj.weight"] for x in "qkvo"} == {WINDOWS * WINDOW}
        for part in ("w1", "w2", "w3"):
            each = [
                tokens[f"{base}.block_sparse_moe.experts.{expert}.{part}.weight"]
                for expert in range(EXPERTS)
            ]
            assert sum(each) == 2 * WINDOWS * WINDOW
    for entry in document["tensors"]:
        assert 0 < entry["relative_error"] < 0.2
        assert 0 < entry["output_error"] < 0.2
        assert entry["damping"] >= 0.002
        assert (entry["raised"], entry["fallback"]) == (0, None)
        assert entry["seconds"] >= 0
    rows = {row["kind"]: row for row in document["kinds"]}
    assert rows["expert"]["output_error"] < rows["expert"]["relative_error"]
    assert rows["norm"]["output_error"] is None
    assert any(line.startswith("experts saw ") for line in report.remarks())


def test_tokens_in_files_give_the_same_bytes_and_so_does_a_second_run(source, tmp_path):
    run(source, tmp_path / "a")
    run(source, tmp_path / "b")
    run(source, tmp_path / "c", activation_bytes=0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "c")
    run(source, tmp_path / "d", calibration=windows(2))
    shard = "model-00002-of-00004.safetensors"
    assert contents(tmp_path / "a")[shard] != contents(tmp_path / "d")[shard]


def recorded(monkeypatch):
    """The sums that the solver is given, by the tensor's name."""
    sums, original = {}, gptq.solve

    def solve(weights, moments, scheme, options, *, where, parts=None, **others):
        for name, one in zip(where, moments, strict=True):
            sums[name.rpartition(": ")[2]] = one.copy()
        return original(weights, moments, scheme, options, where=where, parts=parts, **others)

    monkeypatch.setattr(gptq, "solve", solve)
    return sums


@torch.no_grad()
def seen_by(folder, ids, weighting="none"):
    """What each matrix of a finished model gets: the same sums, from the model itself."""
    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, device="cpu")
    inputs = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "gate")):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2))
            )
    model(input_ids=ids)
    sums = {f"{name}.weight": x.T @ x for name, x in inputs.items() if not name.endswith("gate")}
    for name, module in model.named_modules():
        if not name.endswith("block_sparse_moe"):
            continue
        x = inputs[f"{name}.gate"]
        routes = kernels.route(module.gate(x), module.num_experts_per_tok)
        for expert, matrices in enumerate(module.experts):
            token, slot = torch.where(routes.ids == expert)
            score = routes.weights[token, slot, None]
            share = {"none": torch.ones_like(score), "score": score, "square": score**2}[weighting]
            mine = x[token]
            inner = torch.nn.functional.silu(matrices.w1(mine)) * matrices.w3(mine)
            sums[f"{name}.experts.{expert}.w1.weight"] = (share * mine).T @ mine
            sums[f"{name}.experts.{expert}.w2.weight"] = (share * inner).T @ inner
    return sums


@pytest.mark.parametrize("weighting", ["none", "score", "square"])
@pytest.mark.parametrize("correct", [False, True])
def test_each_matrix_sees_what_the_rounded_ones_before_it_make(
    source, tmp_path, monkeypatch, weighting, correct
):
    """The inputs at which it was rounded are those that it gets in the finished model."""
    sums = recorded(monkeypatch)
    run(source, tmp_path / "out", weighting=weighting, correct=correct)
    expected = seen_by(tmp_path / "out", windows().ids, weighting)
    assert sums.keys() == expected.keys()
    assert len(sums) == LAYERS * (2 + 2 * EXPERTS)
    unrounded = seen_by(source, windows().ids, weighting)
    for name, moments in sums.items():
        scale = float(expected[name].norm())
        assert float((moments.hessian - expected[name]).norm()) < 1e-3 * scale, name
        first = name == "model.layers.0.self_attn.q_proj.weight"
        assert (float((unrounded[name] - expected[name]).norm()) < 1e-3 * scale) == first, name
        assert (moments.cross is not None) == correct
        if first and correct:
            assert torch.equal(moments.cross, moments.hessian)


def test_correction_brings_the_outputs_closer_to_the_unrounded_models(source, tmp_path):
    losses = {}
    dense = MixtralForCausalLM.from_pretrained(source, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        exact = dense(input_ids=windows().ids).logits.log_softmax(-1)
        for correct in (False, True):
            out = tmp_path / str(correct)
            run(source, out, correct=correct, rounding=gptq.RoundingOptions())
            model = MixtralForCausalLM.from_pretrained(out, dtype=torch.float32, device="cpu")
            other = model(input_ids=windows().ids).logits.log_softmax(-1)
            losses[correct] = float((exact.exp() * (exact - other)).sum(-1).mean())
    assert losses[True] < losses[False]


def test_an_expert_without_tokens_is_reported_and_written(tmp_path):
    """Of the five router rows v, -v, w, -w and 0, two are always above 0."""
    source = write_source(tmp_path / "source", num_local_experts=5)
    for path in source.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("gate.weight"):
                gate = tensors[name]
                gate[1], gate[3], gate[4] = -gate[0], -gate[2], 0
        save_file(tensors, path)
    report = run(source, tmp_path / "out")
    unseen = [tensor for tensor in report.tensors if tensor.tokens == 0]
    assert {tensor.name for tensor in unseen} == {
        f"model.layers.{layer}.block_sparse_moe.experts.4.{part}.weight"
        for layer in range(LAYERS)
        for part in ("w1", "w2", "w3")
    }
    for tensor in unseen:
        assert tensor.fallback == "fewer than 8 tokens"
        assert (tensor.output_error, tensor.damping) == (None, None)
        assert 0 < tensor.relative_error < 0.15
    assert any("rounded to nearest: 6 matrices" in line for line in report.remarks())
    assert any("experts saw 0 " in line for line in report.remarks())
    assert verify(tmp_path / "out").problems == ()


@pytest.mark.parametrize("correct", [False, True])
def test_the_attention_may_stay_dense(source, tmp_path, correct):
    report = run(
        source, tmp_path / "out", recipe=Recipe.uniform(INT4, attention=False), correct=correct
    )
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    kinds = {tensor.kind for tensor in report.tensors if tensor.tokens is not None}
    assert kinds == {"expert"}
    for tensor in after.tensors:
        if tensor.kind == "attention":
            assert torch.equal(after.read(tensor.name), before.read(tensor.name))
    assert verify(tmp_path / "out").problems == ()


def test_mixed_schemes_within_one_stack(source, tmp_path):
    """k in 8 bits, w3 of one expert dense: each is solved with its kind, from the same inputs."""
    wide = Scheme(kind="int8", group_size=32)
    rules = (
        (r".*\.k_proj\.weight", wide),
        (r".*layers\.0\..*experts\.1\.w3\.weight", Scheme(kind="dense")),
    )
    report = run(source, tmp_path / "out", recipe=Recipe(rules + RECIPE.rules))
    schemes = {tensor.name: tensor.scheme for tensor in report.tensors}
    assert schemes["model.layers.1.self_attn.k_proj.weight"] == wide
    assert schemes["model.layers.1.self_attn.q_proj.weight"] == INT4
    expert = "model.layers.0.block_sparse_moe.experts.1"
    assert schemes[f"{expert}.w3.weight"].kind == "dense"
    assert schemes[f"{expert}.w1.weight"] == INT4
    errors = {tensor.name: tensor.output_error for tensor in report.tensors}
    assert errors["model.layers.1.self_attn.k_proj.weight"] < 0.02
    assert verify(tmp_path / "out").problems == ()


def test_a_layer_larger_than_a_file_is_refused_by_the_options_name(source, tmp_path):
    with pytest.raises(
        UsageError,
        match=r"--shard-size: each layer is written to one file.*expected at least \d+ B",
    ):
        run(source, tmp_path / "out", shard_bytes=50_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("changes", "text", "named"),
    [
        ({"seqlen": 513}, TEXT, "--seqlen: longer than the model's positions; expected at most 512; found 513"),
        ({"seqlen": 400}, "too short", "the calibration text is too short; expected 399 tokens"),
        ({"seqlen": 1}, TEXT, "too little calibration"),
        ({"samples": 0}, TEXT, "too little calibration"),
        ({"seqlen": 32, "shard_bytes": 50_000}, TEXT, "--shard-size"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_as_usage(source, tmp_path, changes, text, named):
    request = QuantizeRequest(**{"method": "gptq", "group_size": 32, "device": "cpu", **changes})
    with pytest.raises(UsageError, match=named):
        quantize_checkpoint(source, tmp_path / "out", request, text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_group_that_does_not_divide_and_a_quantized_source_are_refused(source, tmp_path):
    with pytest.raises(UnsupportedError):
        run(
            source,
            tmp_path / "out",
            recipe=Recipe.uniform(replace(INT4, group_size=128), attention=True),
        )
    run(source, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="quantized already"):
        run(tmp_path / "out", tmp_path / "twice")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        "model.layers.1.self_attn.o_proj.weight",
    ],
)
def test_a_weight_that_is_not_finite_is_named_before_any_layer_is_rounded(source, tmp_path, name):
    path = spoil(source, name, float("nan"))
    with pytest.raises(CheckpointError) as caught:
        run(source, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert name in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_so_is_one_outside_the_layers(source, tmp_path, name):
    path = spoil(source, name, float("inf"))
    with pytest.raises(CheckpointError) as caught:
        run(source, tmp_path / "out")
    assert name in str(caught.value)
    assert str(path) in str(caught.value)


def test_activations_that_overflow_are_an_error_and_no_layer_of_noise(source, tmp_path):
    path = open_checkpoint(source).entry("model.layers.0.input_layernorm.weight").file
    tensors = load_file(path)
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(1e38)
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        run(source, tmp_path / "out")
    assert caught.value.exit_code == 3
    assert "layers.0" in str(caught.value) or "layer 0" in str(caught.value)


def test_an_interruption_keeps_the_layer_and_says_how_to_go_on(source, tmp_path):
    with pytest.raises(
        InterruptedRunError, match=r"out\.partial: interrupted after layer 1 of 2.*--resume"
    ) as caught:
        run(source, tmp_path / "out", interrupted=lambda: True)
    assert caught.value.exit_code == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "source"]
    # In the last layer there is nothing left to interrupt.
    run(source, tmp_path / "out", interrupted=lambda: True, resumed=True)
    assert verify(tmp_path / "out").problems == ()


def test_force_replaces_and_its_absence_refuses(source, tmp_path):
    run(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match="OUT exists"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", force=True, calibration=windows(3))
    assert contents(tmp_path / "out") != before
