"""Raw Mistral checkpoints: what `qmix convert` makes of them, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmix
from qmix.commands.checkpoint.convert import convert_checkpoint
from qmix.commands.checkpoint.inspect import inspect
from qmix.commands.checkpoint.verify import verify
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ConfigError, UnsupportedError, UsageError
from qmix.evals.quality import evaluation
from qmix.evals.quality.texts import Text
from qmix.formats import open_checkpoint
from qmix.formats.files import shard_writer, shards
from qmix.formats.mistral import checkpoint as mistral
from qmix.formats.mistral import params
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.text.tokenizer import LlamaTokenizer
from tests.support import raw_mistral
from tests.support.models import quantized, small_config, small_model
from tests.support.process import qmix as command_line
from tests.support.process import succeeds
from tests.support.raw_mistral import refused

IDS = torch.tensor([[1, 5, 9, 77, 3]])
TRUE_LAYOUTS = [
    ("pickles", True, "hf"),  # the hub's eight files, and params.json as its converter reads it
    ("pickles", True, "dim"),
    ("pth", False, "dim"),  # the first release
    ("safetensors", False, "dim"),
]
E8 = "layers.2.block_sparse_moe.w1"


@pytest.fixture(scope="module")
def model():
    return small_model(max_position_embeddings=32768).to(torch.bfloat16)


@pytest.fixture
def raw(model, tmp_path):
    """Eight pickles with stacked experts."""
    return raw_mistral.write(tmp_path / "raw", model)


@pytest.fixture
def whole(model, tmp_path):
    """One safetensors file with single experts."""
    return raw_mistral.write(
        tmp_path / "whole", model, layout="safetensors", stacked=False, spelling="dim"
    )


def changed(folder, **changes):
    """Replace tensors of `consolidated.safetensors`; None removes one; __ stands for a dot."""
    path = folder / "consolidated.safetensors"
    tensors = load_file(path)
    for spelled, tensor in changes.items():
        name = spelled.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


def set_params(folder, **changes):
    path = folder / "params.json"
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value != "-"}))


# What comes out


@pytest.mark.parametrize(("layout", "stacked", "spelling"), TRUE_LAYOUTS)
def test_every_layout_gives_the_models_own_bits(model, tmp_path, layout, stacked, spelling):
    source = raw_mistral.write(
        tmp_path / "raw", model, layout=layout, stacked=stacked, spelling=spelling
    )
    result = convert_checkpoint(source, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    expected = model.state_dict()
    assert {tensor.name for tensor in checkpoint.tensors} == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    assert result.tensors == len(expected)
    assert result.parameters == sum(tensor.numel() for tensor in expected.values())
    again = MixtralForCausalLM.from_pretrained(tmp_path / "out", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_rotary_pairs_and_halves_attend_alike(model, tmp_path):
    """Mistral turns pairs (2i, 2i+1) of the raw rows; qmix turns rows i and i + d/2 of its own."""
    source = raw_mistral.write(tmp_path / "raw", model, layout="safetensors", stacked=False)
    raw = load_file(source / "consolidated.safetensors")
    checkpoint = mistral.open_raw(source)
    heads, theta = model.config.num_attention_heads, model.config.rope_theta
    width = model.config.head_dim
    x = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    angles = torch.tensor([3.0, 11.0])[:, None] * theta ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.ones_like(angles), angles)

    def pairs(weight):
        rows = (x @ weight.float().T)[:, :width].view(2, -1, 2)
        return torch.view_as_real(torch.view_as_complex(rows) * turn).flatten(1)

    def halves(weight):
        first, second = (x @ weight.float().T)[:, :width].chunk(2, dim=1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=1)

    names = [t for t in checkpoint.tensors if t.name.endswith(("0.self_attn.q_proj.weight", "0.self_attn.k_proj.weight"))]  # fmt: skip
    q, k = (halves(checkpoint.read(tensor)) for tensor in names)
    raw_q = pairs(raw["layers.0.attention.wq.weight"])
    raw_k = pairs(raw["layers.0.attention.wk.weight"])
    assert heads > 1
    torch.testing.assert_close(q[0] @ k[1], raw_q[0] @ raw_k[1])
    assert abs(q[0] @ k[1]) > 0.01


def test_the_config_is_of_mixtral_8x7b_where_params_are_silent(raw, tmp_path):
    set_params(raw, rope_theta="-")
    convert_checkpoint(raw, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert document["rope_theta"] == 1e6
    assert document["max_position_embeddings"] == 32768
    assert document["sliding_window"] is None
    assert document["num_experts_per_tok"] == 2
    assert document["torch_dtype"] == "bfloat16"
    assert document["architectures"] == ["MixtralForCausalLM"]
    assert document["model_type"] == "mixtral"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_dtype_is_kept_and_nothing_is_rounded(tmp_path, dtype):
    model = small_model(num_hidden_layers=1).to(dtype)
    convert_checkpoint(raw_mistral.write(tmp_path / "raw", model), tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.dtype == dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_a_head_width_of_its_own_is_kept(tmp_path):
    model = small_model(num_hidden_layers=1, head_dim=16)
    source = raw_mistral.write(tmp_path / "raw", model, spelling="dim")
    convert_checkpoint(source, tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.head_dim == 16
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(checkpoint.read(name), model.state_dict()[name])


def test_the_result_is_a_checkpoint_directory_that_verifies(raw, tiny, tmp_path):
    convert_checkpoint(raw, tmp_path / "out", shard_bytes=200_000)
    out = tmp_path / "out"
    verdict = verify(out)
    assert verdict.problems == ()
    assert verdict.hashed == len(list(out.iterdir())) - 1
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    assert verify(quantized(out, tmp_path / "nf4")).problems == ()


def test_two_conversions_write_the_same_bytes_whatever_the_layout(model, raw, whole, tmp_path):
    convert_checkpoint(raw, tmp_path / "a")
    convert_checkpoint(whole, tmp_path / "b")
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_progress_tells_each_tensor_and_ends_at_the_whole(raw, tmp_path):
    seen = []
    convert_checkpoint(raw, tmp_path / "out", progress=lambda *at: seen.append(at))
    done, totals = [at[1] for at in seen], {at[2] for at in seen}
    assert done == sorted(done)
    assert totals == {done[-1]}
    assert seen[0][0] == "model.embed_tokens.weight"


# The tokenizer


def tokenizer_of(pieces, tiny):
    from qmix.evals.synthetic import padded_tokenizer

    return padded_tokenizer((tiny / "tokenizer.model").read_bytes(), pieces)


def test_the_tokenizer_comes_along_with_what_stands_beside_it_elsewhere(tiny, tmp_path):
    model = small_model(vocab_size=2048, num_hidden_layers=1)
    source = raw_mistral.write(tmp_path / "raw", model, tokenizer=tiny / "tokenizer.model")
    result = convert_checkpoint(source, tmp_path / "out")
    out = tmp_path / "out"
    assert result.tokenizer == "tokenizer.model"
    assert (out / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()
    config = json.loads((out / "tokenizer_config.json").read_text())
    theirs = json.loads((tiny / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert {key: theirs[key] for key in config} == config
    ours, reference = LlamaTokenizer.from_pretrained(out), LlamaTokenizer.from_pretrained(tiny)
    assert ours.encode("Return a list") == reference.encode("Return a list")
    assert qmix.load(out, device="cpu")[1].vocab_size == 2048


@pytest.mark.parametrize("pieces", [2048, 2100])
def test_of_several_tokenizers_the_one_with_the_models_vocabulary_is_carried(
    tiny, tmp_path, pieces
):
    model = small_model(vocab_size=pieces, num_hidden_layers=1)
    source = raw_mistral.write(tmp_path / "raw", model)
    for name, size in (("tokenizer.model.v1", 2048), ("tokenizer.model.v3", 2100)):
        (source / name).write_bytes(tokenizer_of(size, tiny))
    result = convert_checkpoint(source, tmp_path / "out")
    assert result.tokenizer == {2048: "tokenizer.model.v1", 2100: "tokenizer.model.v3"}[pieces]
    assert LlamaTokenizer.from_pretrained(tmp_path / "out").vocab_size == pieces


def test_a_tokenizer_of_another_model_is_refused_before_any_work(tiny, raw, tmp_path):
    shutil.copy(tiny / "tokenizer.model", raw)
    refused(raw, tmp_path, r"2048 in tokenizer\.model")


def test_a_damaged_tokenizer_is_refused(raw, tmp_path):
    (raw / "tokenizer.model.v1").write_bytes(b"not a tokenizer")
    refused(raw, tmp_path, r"tokenizer\.model\.v1")


def test_no_tokenizer_is_no_obstacle(raw, tmp_path):
    result = convert_checkpoint(raw, tmp_path / "out")
    assert result.tokenizer is None
    assert not (tmp_path / "out" / "tokenizer.model").exists()


# params.json


def test_both_spellings_say_the_same(tmp_path):
    config = small_config(rope_theta=5e5)
    read = []
    for spelling in ("hf", "dim"):
        path = tmp_path / f"{spelling}.json"
        path.write_text(json.dumps(raw_mistral.params(config, spelling)))
        read.append(params.read(path)[0])
    assert read[0] == read[1]
    assert read[0].rope_theta == 5e5
    assert read[0].hidden_size == config.hidden_size


def test_what_the_original_release_says_is_mixtral_8x7b(tmp_path):
    """The torrent's params.json, as quoted in issue 3 of vikhyat/mixtral-inference."""
    path = tmp_path / "params.json"
    path.write_text(
        '{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, '
        '"n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32000, '
        '"moe": {"num_experts_per_tok": 2, "num_experts": 8}}'
    )
    config, ignored = params.read(path)
    assert config == MixtralConfig(max_position_embeddings=32768)
    assert ignored == ()


def test_what_is_left_aside_is_named(raw, tmp_path):
    set_params(raw, max_batch_size=8, moe={}, use_biases=False, vision=None)
    result = convert_checkpoint(raw, tmp_path / "out")
    assert result.ignored == ("max_batch_size", "sliding_window")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dim": "64"}, "dim"),
        ({"dim": True}, "dim"),
        ({"n_layers": 10**9}, "n_layers"),
        ({"n_layers": 2.0}, "n_layers"),
        ({"n_kv_heads": 3}, "n_kv_heads"),
        ({"n_heads": None}, "n_heads"),
        ({"norm_eps": "-"}, "norm_eps"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"head_dim": 0}, "head_dim"),
        ({"moe": "-"}, r"moe\.num_experts"),
        ({"moe": 8}, "moe"),
        ({"moe": {"num_experts": "8"}}, r"moe\.num_experts"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 9}}, r"moe\.num_experts_per_tok"),
        ({"hidden_size": 128}, "dim"),
    ],
    ids=str,
)
def test_wrong_params_are_refused_by_the_name_in_the_file(whole, tmp_path, change, named):
    set_params(whole, **change)
    refused(whole, tmp_path, rf"params\.json: ({named})\b", ConfigError)


@pytest.mark.parametrize("text", ["", "[]", '{"dim": NaN}', '{"dim": 64, "dim": 64}', "[" * 10**5])
def test_params_that_are_no_json_object_are_refused(whole, tmp_path, text):
    (whole / "params.json").write_text(text)
    refused(whole, tmp_path, r"params\.json")


def test_params_of_another_model_are_refused_by_shape(whole, tmp_path):
    set_params(whole, hidden_dim=97)
    refused(whole, tmp_path, r"w1\.weight.*\[97, 64\].*\[96, 64\]")


def test_more_layers_or_experts_than_files_are_refused_in_seconds(whole, tmp_path):
    set_params(whole, n_layers=1024, moe={"num_experts": 1024})
    refused(whole, tmp_path, "not the tensors")


def test_a_config_json_stands_in_for_params(model, raw, tmp_path):
    """The hub's Mixtral repository holds the pickles and config.json, but no params.json."""
    (raw / "params.json").unlink()
    model.config.replace(rope_theta=7e5).save_pretrained(raw)
    convert_checkpoint(raw, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").config.rope_theta == 7e5


def test_neither_params_nor_config_is_refused(raw, tmp_path):
    (raw / "params.json").unlink()
    refused(raw, tmp_path, r"params\.json")


# The set of tensors

EXPERT = "layers__1__feed_forward__experts__3__w2__weight"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({EXPERT: None}, "1 missing, 0 left over.*missing layers.1.feed_forward.experts.3.w2"),
        ({"layers__0__attention__wq__bias": torch.zeros(3)}, "left over layers.0.attention.wq.bias"),
        ({"layers__1__feed_forward__experts__8__w1__weight": torch.zeros(3)}, "left over.*experts.8"),
        ({EXPERT: torch.zeros(96, 64).bfloat16()}, r"experts.3.w2.*\[64, 96\].*\[96, 64\]"),
        ({EXPERT: torch.zeros(64, 96, 1).bfloat16()}, r"experts.3.w2.*shape"),
        ({EXPERT: torch.zeros(64, 96, dtype=torch.int8)}, "experts.3.w2.*dtype.*int8"),
        ({"output__weight": None}, "missing output.weight"),
        ({"norm__weight": torch.full((64,), float("nan")).bfloat16()}, "model.norm.weight.*NaN"),
        ({EXPERT: torch.full((64, 96), float("-inf")).bfloat16()}, "experts.3.w2.weight.*infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_anything_but_the_models_tensors_is_refused(whole, tmp_path, changes, match):
    changed(whole, **changes)
    refused(whole, tmp_path, match)


def test_at_most_five_wrong_tensors_are_named(whole, tmp_path):
    path = whole / "consolidated.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if not n.startswith("layers.1.")}
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        convert_checkpoint(whole, tmp_path / "out")
    assert str(caught.value).count("missing layers") == 5


def test_a_layer_in_the_other_layouts_names_is_left_over(raw, tmp_path):
    path = next(p for p in sorted(raw.glob("*.pt")) if E8 in torch.load(p))
    tensors = torch.load(path)
    tensors["layers.2.feed_forward.experts.0.w1.weight"] = tensors.pop(E8)[:96].clone()
    torch.save(tensors, path)
    refused(raw, tmp_path, "missing, .*left over")


def test_a_stack_of_another_number_of_experts_is_refused(raw, tmp_path):
    set_params(raw, num_local_experts=4)
    refused(raw, tmp_path, r"expected \[(4, 64|384, 64)\]")


def test_a_tensor_in_two_files_is_refused_with_both(raw, tmp_path):
    first = torch.load(raw / "consolidated.00.pt")
    second = torch.load(raw / "consolidated.07.pt")
    name = next(iter(first))
    torch.save({**second, name: first[name]}, raw / "consolidated.07.pt")
    refused(raw, tmp_path, rf"{name}.*consolidated\.00\.pt.*consolidated\.07\.pt")


def test_a_missing_pickle_is_missing_tensors(raw, tmp_path):
    (raw / "consolidated.03.pt").unlink()
    refused(raw, tmp_path, "missing")


def test_a_folder_without_raw_files_is_refused(tmp_path, tiny):
    with pytest.raises(CheckpointError, match="consolidated"):
        convert_checkpoint(tmp_path, tmp_path.parent / "never")
    with pytest.raises(CheckpointError, match="Hugging Face checkpoint"):
        convert_checkpoint(tiny, tmp_path / "never")
    with pytest.raises(CheckpointError, match="no such directory"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "never")


def test_safetensors_are_preferred_to_pickles_of_the_same_weights(model, whole, tmp_path):
    (whole / "consolidated.00.pth").write_bytes(b"not looked at")
    convert_checkpoint(whole, tmp_path / "out")
    assert verify(tmp_path / "out").problems == ()


# The output directory


def test_an_existing_output_is_refused_without_force_and_replaced_with_it(raw, tmp_path):
    convert_checkpoint(raw, tmp_path / "out")
    with pytest.raises(UsageError, match="OUT exists"):
        convert_checkpoint(raw, tmp_path / "out")
    convert_checkpoint(raw, tmp_path / "out", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]
    with pytest.raises(UsageError):
        convert_checkpoint(raw, raw / "inside", force=True)


def test_a_failed_forced_run_keeps_the_old_output(whole, tmp_path):
    convert_checkpoint(whole, tmp_path / "out")
    changed(whole, norm__weight=torch.full((64,), float("nan")).bfloat16())
    with pytest.raises(CheckpointError, match="NaN"):
        convert_checkpoint(whole, tmp_path / "out", force=True)
    assert verify(tmp_path / "out").problems == ()


def test_a_raw_folder_is_never_replaced_by_force(raw, tmp_path, whole):
    """A raw folder holds pickles; --force replaces only what qmix could have written."""
    with pytest.raises(UsageError, match="qmix did not write"):
        convert_checkpoint(whole, raw, force=True)


# Memory


def test_a_stack_is_read_one_expert_at_a_time(raw, tmp_path, monkeypatch):
    written, read = [], []
    write, reader = shard_writer.ShardWriter.write, shards.read_entry

    def writing(self, name, tensor):
        written.append(tensor.untyped_storage().nbytes() == tensor.nbytes)
        return write(self, name, tensor)

    def reading(name, entry):
        tensor = reader(name, entry)
        read.append((name, tuple(tensor.shape)))
        return tensor

    monkeypatch.setattr(shard_writer.ShardWriter, "write", writing)
    monkeypatch.setattr(shards, "read_entry", reading)
    convert_checkpoint(raw, tmp_path / "out")
    assert all(written)
    stacks = [shape for name, shape in read if ".block_sparse_moe.w" in name]
    assert stacks == [(96, 64)] * (3 * 8 * 3)


def test_memory_is_that_of_a_matrix_and_not_of_a_stack(tmp_path):
    """A stack has 32 MiB here, the file 100; the second conversion may add less than a stack."""
    torch.manual_seed(0)
    config = small_config(hidden_size=1024, intermediate_size=2048, num_hidden_layers=1)
    with torch.device("meta"):
        model = MixtralForCausalLM(config).to(torch.bfloat16)
    state = {n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in model.state_dict().items()}
    large = tmp_path / "large"
    large.mkdir()
    tensors = raw_mistral.raw_tensors(state, config, stacked=True)
    raw_mistral.write_weights(large, tensors, "pth")
    (large / "params.json").write_text(json.dumps(raw_mistral.params(config, "dim")))
    raw_mistral.write(tmp_path / "small", small_model(), layout="pth")
    code = f"""
import resource
from pathlib import Path
from qmix.commands.checkpoint.convert import convert_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
folder = Path({str(tmp_path)!r})
convert_checkpoint(folder / "small", folder / "first")
before = peak()
convert_checkpoint(folder / "large", folder / "second")
print(peak() - before)
"""
    grown = int(succeeds(code)) * 1024
    assert grown < 32 << 20


# Where raw folders are refused


@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "tokenizer.model.v3", None])
@pytest.mark.parametrize("config", ["params.json", "config.json"])
@pytest.mark.parametrize("layout", raw_mistral.LAYOUTS)
def test_everywhere_else_a_raw_folder_is_sent_to_convert(
    model, tiny, tmp_path, layout, config, tokenizer
):
    folder = raw_mistral.write(tmp_path / "raw", model, layout=layout)
    if config == "config.json":
        (folder / "params.json").unlink()
        model.config.save_pretrained(folder)
    if tokenizer:
        shutil.copy(tiny / "tokenizer.model", folder / tokenizer)
    text = Text.of("some words " * 40)
    for attempt in (
        lambda: open_checkpoint(folder),
        lambda: inspect(folder),
        lambda: verify(folder),
        lambda: qmix.load(folder, device="cpu"),
        lambda: MixtralForCausalLM.from_pretrained(folder, device="cpu"),
        lambda: quantized(folder, tmp_path / "out"),
        lambda: evaluation.evaluate(folder, text),
    ):
        with pytest.raises(UnsupportedError, match="qmix convert RAW OUT"):
            attempt()


def test_converted_files_beside_the_raw_ones_are_used(raw, tmp_path):
    convert_checkpoint(raw, tmp_path / "out")
    for path in raw.iterdir():
        shutil.copy(path, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").tensors


# The command


def test_the_tiny_model_comes_back_through_the_command_line(tiny, tmp_path):
    model = MixtralForCausalLM.from_pretrained(tiny, device="cpu")
    source = raw_mistral.write(
        tmp_path / "raw", model, layout="safetensors", tokenizer=tiny / "tokenizer.model"
    )
    done = command_line("convert", source, tmp_path / "out", "--shard-size", "4MB")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "sliding_window" in done.stderr
    assert "Traceback" not in done.stderr
    assert command_line("verify", tmp_path / "out").returncode == 0
    said = command_line("generate", tmp_path / "out", "Return the", "--max-new-tokens", 12)
    loaded, _ = qmix.load(tiny, device="cpu")
    expected = "".join(loaded.stream("Return the", max_new_tokens=12))
    assert said.stdout.rstrip("\n") == expected.rstrip("\n") != ""
    again = command_line("convert", source, tmp_path / "out")
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_the_command_says_that_there_is_no_tokenizer(whole, tmp_path):
    done = command_line("convert", whole, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "tokenizer.model" in done.stderr


def test_a_raw_folder_is_sent_to_convert_by_the_command_line(whole, tmp_path):
    done = command_line("quantize", whole, tmp_path / "out")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "qmix convert RAW OUT" in done.stderr


def test_help_shows_an_example():
    done = command_line("convert", "--help")
    assert done.returncode == 0
    assert "qmix convert" in done.stdout
