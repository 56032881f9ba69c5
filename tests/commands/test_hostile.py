"""What a careless or hostile user does: neighbours of OUT, odd files, misuse of the Python API."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmix
from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, QmixError, UnsupportedError, UsageError
from qmix.evals.quality import perplexity
from qmix.formats import open_checkpoint
from qmix.formats.files import output_dir
from qmix.generation.config import GenerationConfig
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.quantize.streaming import quantize_streaming
from qmix.weights.scheme import NF4, Recipe
from tests.support.models import ROOT, TINY, small_model
from tests.support.process import PATIENCE, started
from tests.support.process import run as chat_lines

SHARD = "model-00001-of-00001.safetensors"
IDS = torch.tensor([[1, 5, 6, 7]])


def quantize(source, out, **options):
    return quantize_streaming(
        source, out, Recipe.uniform(NF4, attention=True), method="nf4", **options
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def command(*arguments, environment=None, **options):
    return subprocess.run(
        [sys.executable, "-m", "qmix.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
        timeout=PATIENCE,
        check=False,
        **options,
    )


@pytest.fixture
def source(tmp_path):
    """A small bf16 checkpoint with the tiny model's tokenizer."""
    folder = tmp_path / "source"
    model = small_model(vocab_size=2048, num_hidden_layers=1, eos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


@pytest.fixture
def packed(source, tmp_path):
    quantize(source, tmp_path / "packed")
    return tmp_path / "packed"


# Nothing is lost


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_source_whose_name_is_out_with_our_suffix_survives(source, tmp_path, suffix):
    neighbour = source.rename(tmp_path / f"m{suffix}")
    before = contents(neighbour)
    with suppress(UsageError):
        quantize(neighbour, tmp_path / "m")
    assert contents(neighbour) == before


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_directory_that_is_not_ours_beside_out_survives(source, tmp_path, suffix):
    neighbour = tmp_path / f"m{suffix}"
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("years of work")
    with suppress(UsageError):
        quantize(source, tmp_path / "m")
    assert (neighbour / "thesis.txt").read_text() == "years of work"


def test_a_link_named_out_partial_is_not_followed(source, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "m.partial").symlink_to(home)
    with suppress(UsageError):
        quantize(source, tmp_path / "m")
    assert contents(home) == {"thesis.txt": b"years of work"}


def test_a_file_named_out_partial_is_refused_by_name(source, tmp_path):
    (tmp_path / "m.partial").write_text("notes")
    with pytest.raises(QmixError, match=r"m\.partial"):
        quantize(source, tmp_path / "m")


def test_a_second_run_in_the_moment_of_the_rename_cannot_empty_the_first_ones_output(
    source, tmp_path, monkeypatch
):
    out, sync, tried = tmp_path / "m", output_dir._sync, []

    def sync_beside_a_second_run(folder):
        if not tried:
            tried.append(folder)
            with suppress(CheckpointError), output_dir.partial(out):
                pass
        sync(folder)

    monkeypatch.setattr(output_dir, "_sync", sync_beside_a_second_run)
    quantize(source, out)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("out", [".", ".."])
def test_out_by_a_dot_is_refused_as_usage(packed, source, monkeypatch, out):
    (packed / "sub").mkdir()
    monkeypatch.chdir(packed if out == "." else packed / "sub")
    with pytest.raises(UsageError):
        quantize(source, type(source)(out), force=True)
    assert (packed / "config.json").is_file()


# The 4-bit model as a module


def test_a_4_bit_model_can_be_called_without_no_grad(packed):
    model, _ = qmix.load(packed, device="cpu")
    with torch.no_grad():
        expected = model(IDS).logits
    assert torch.equal(model(IDS).logits, expected)


def test_the_loss_of_a_4_bit_model_has_a_gradient_by_its_dense_weights(packed):
    model, _ = qmix.load(packed, device="cpu", dtype="float32")
    model(IDS, labels=IDS).loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert bool(gradient.abs().sum() > 0)


# Hostile files


@pytest.mark.parametrize("count", [200_000])  # minutes, if each key were compared with all before
def test_a_duplicate_key_at_the_end_of_a_large_document_is_found(count):
    pairs = ",".join(f'"{index:x}":0' for index in range(count))
    with pytest.raises(CheckpointError, match="appears twice"):
        strict_json.loads(f'{{{pairs},"{count - 1:x}":0}}', where="config.json")


def test_a_config_of_a_quarter_of_a_million_experts_is_refused(source):
    document = json.loads((source / "config.json").read_text())
    document.update(num_hidden_layers=1024, num_local_experts=256)
    (source / "config.json").write_text(json.dumps(document))
    with pytest.raises(QmixError):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "entry", [{"eos_token_id": [None]}, {"eos_token_id": 1 << 70}, {"self": 1}]
)
def test_odd_config_entries_are_an_error_of_ours_or_harmless(source, entry):
    document = {**json.loads((source / "config.json").read_text()), **entry}
    (source / "config.json").write_text(json.dumps(document))
    with suppress(CheckpointError, UnsupportedError):
        model, _ = qmix.load(source, device="cpu")
        model.generate(IDS, max_new_tokens=2)


def test_a_null_dtype_beside_torch_dtype_says_nothing():
    assert MixtralConfig.from_dict({"dtype": None, "torch_dtype": "float16"}).dtype == "float16"


def test_a_quant_state_of_two_dimensions_is_refused(packed):
    file = next(packed.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if "quant_state" in name)
    tensors[name] = tensors[name][None]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="quant_state"):
        qmix.load(packed, device="cpu")


def test_a_pickle_of_todays_protocol_is_called_by_its_name(source):
    (source / SHARD).write_bytes(pickle.dumps({"weights": list(range(1000))}))
    with pytest.raises(CheckpointError, match="a Python pickle"):
        open_checkpoint(source)


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.model"])
def test_a_pipe_in_place_of_a_file_never_blocks(source, name):
    (source / name).unlink()
    os.mkfifo(source / name)
    with pytest.raises(CheckpointError):
        qmix.load(source, device="cpu")


def test_a_hub_cache_of_links_into_its_blobs_is_read(source, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        path.rename(blobs / f"{path.name}-hash")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-hash")
    model, _ = qmix.load(snapshot, device="cpu")
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 6)


def test_the_companion_files_of_a_real_hub_directory_do_not_disturb(source):
    special = {"0": {"content": "<unk>", "special": True}}
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "added_tokens_decoder": special,
                "model_max_length": 1000000000000000019884624838656,
                "chat_template": [{"name": "default", "template": "{{ 1 / 0 }}"}],
                "bos_token": {"__type": "AddedToken", "content": "<s>"},
                "pad_token": None,
            }
        )
    )
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5], "pad_token_id": -1}')
    (source / "tokenizer.json").write_text("{}")
    (source / "consolidated.safetensors").write_bytes(b"of another layout")
    model, tokenizer = qmix.load(source, device="cpu")
    assert tokenizer.encode("a")[0] == 1
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 6)


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_load(source, tmp_path):
    folder = tmp_path / "narrow"
    small_model(vocab_size=128, num_hidden_layers=1).save_pretrained(folder)
    shutil.copy(source / "tokenizer.model", folder)
    with pytest.raises(CheckpointError, match="2048"):
        qmix.load(folder, device="cpu")


def test_ids_beyond_the_tokenizer_do_not_break_a_reply(source, tmp_path):
    folder = tmp_path / "wide"
    model = small_model(vocab_size=4096, num_hidden_layers=1)  # padded, as for tensor cores
    model.save_pretrained(folder)
    shutil.copy(source / "tokenizer.model", folder)
    model, _ = qmix.load(folder, device="cpu")
    text = list(model.stream("hello", max_new_tokens=60, do_sample=True, seed=0, top_k=0))
    assert isinstance("".join(text), str)


# Misuse of generate


@pytest.mark.parametrize(
    "ids",
    [IDS[0], IDS[None], IDS.float(), IDS.bool(), [[1, 2]], None],
    ids=["1-D", "3-D", "float", "bool", "list", "None"],
)
def test_unfit_prompt_ids_are_refused_as_usage(model, ids):
    with pytest.raises(UsageError, match="input_ids"):
        model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[0, 1, 1, 1, 1]], [[0, 1, 1, 1]] * 2])
def test_a_mask_of_another_shape_than_the_prompt_is_refused_as_usage(model, mask):
    with pytest.raises(UsageError, match="attention_mask"):
        model.generate(IDS, attention_mask=torch.tensor(mask), max_new_tokens=2)


def test_padding_on_the_right_is_refused_warned_of_or_right(model):
    ids, mask = torch.tensor([[1, 5, 6, 0], IDS[0].tolist()]), torch.ones(2, 4, dtype=torch.long)
    mask[0, 3] = 0
    alone = model.generate(ids[:1, :3], max_new_tokens=8)[0, 3:]
    try:
        padded = model.generate(ids, attention_mask=mask, max_new_tokens=8)[0, 4:]
    except (UsageError, UserWarning):
        return
    assert torch.equal(padded, alone)


@pytest.mark.parametrize(
    "option",
    [
        {"seed": "1"},
        {"seed": 1.5},
        {"seed": True},
        {"stop_strings": 5},
        {"eos_token_id": "2"},
    ],
    ids=str,
)
def test_options_of_a_wrong_type_are_refused_as_usage(model, option):
    with pytest.raises(UsageError):
        model.generate(IDS, max_new_tokens=3, **option)


def test_a_temperature_too_small_for_float32_is_greedy_or_refused_but_no_damage_is_claimed(model):
    greedy = model.generate(IDS, max_new_tokens=3)
    try:
        config = GenerationConfig(do_sample=True, temperature=1e-300, seed=0, max_new_tokens=3)
        drawn = model.generate(IDS, generation_config=config)
    except UsageError:
        return
    assert torch.equal(drawn, greedy)


def test_a_dense_model_survives_a_copy_and_a_cast(model):
    import copy

    again = copy.deepcopy(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.half().generate(IDS, max_new_tokens=2).shape == (1, 6)


# Evals


def test_the_protocol_separates_its_clauses_by_commas():
    words = perplexity.scoring_windows(list(range(40)), 8, 8).protocol
    assert "non-overlapping, BOS" in words


# Chat


def test_a_fenced_message_that_begins_with_a_slash_is_a_message():
    session, _, _ = chat_lines('"""\n/etc/passwd is a file\n"""\n')
    assert [turn.user for turn in session.turns] == ["/etc/passwd is a file"]


def test_a_fence_that_the_end_of_input_closes_is_sent_or_spoken_of():
    session, _, notices = chat_lines('"""\nhello\nworld\n')
    assert session.turns or notices


def test_windows_line_ends_of_a_pipe_belong_to_no_message():
    session, _, _ = chat_lines("hello\r\nyou\r\n")
    assert [turn.user for turn in session.turns] == ["hello", "you"]


# The command line


def test_text_that_stdout_cannot_encode_does_not_end_a_command(packed, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("hello world " * 40)
    ascii_only = {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = command("eval", packed, "--data", text, environment=ascii_only, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_closed_stdin_is_an_empty_chat(packed):
    done = subprocess.run(
        ["sh", "-c", '"$0" -m qmix.cli chat "$1" <&-', sys.executable, str(packed)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode in (0, 2)
    assert b"AttributeError" not in done.stderr


def test_a_closed_stderr_changes_no_exit_code(packed, tmp_path):
    for arguments, code in ((["quantize", "nowhere", "out"], 3), (["--version"], 0)):
        done = subprocess.run(
            ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, "-m", "qmix.cli", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == code, arguments


def test_a_reader_that_leaves_gives_the_exit_code_of_a_broken_pipe(packed):
    command = [sys.executable, "-m", "qmix", "generate", packed, "a", "--max-new-tokens", "200"]
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) in (141, -13)  # SIGPIPE: 141 to a shell, -13 to Popen


def test_dense_and_4_bit_models_survive_save_and_load(packed, tmp_path):
    model, _ = qmix.load(packed, device="cpu")
    model.save_pretrained(tmp_path / "again")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "again", device="cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
