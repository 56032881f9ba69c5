"""Folders and files as people have them: taken for what they mean, or named with the remedy."""

import json

import pytest

from qmix.commands import sources
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError
from qmix.hub.local import shown_name
from qmix.hub.source import resolve


def folder(path, *names):
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


def test_a_model_of_the_hubs_cache_is_its_snapshot(tmp_path):
    model = tmp_path / "models--org--name"
    first = folder(model / "snapshots" / ("0" * 40), "config.json")
    for given in (model, model / "snapshots", first):
        assert resolve(given) == first
    second = folder(model / "snapshots" / ("b" * 40), "config.json")
    with pytest.raises(CheckpointError, match=r"several snapshots.*Give one of them"):
        resolve(model)
    folder(model / "refs")
    (model / "refs" / "main").write_text("b" * 40)
    assert resolve(model) == second
    assert shown_name(second) == "org/name@bbbbbbb"
    with pytest.raises(CheckpointError, match=r"cache of a hub.*Give a model's name: org/name"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("names", "what", "remedy"),
    [
        (["optimizer.pt", "trainer_state.json"], "the state of a training", "save_pretrained"),
        (["latest", "global_step500/mp_rank_00_model_states.pt"], "DeepSpeed", "zero_to_fp32"),
        ([".metadata", "__0_0.distcp"], "distributed checkpoint", "merge-weights"),
        (["checkpoint-500/config.json", "checkpoint-1000/config.json", "trainer_state.json"],
         "a folder of checkpoints.*checkpoint-500, checkpoint-1000", "such as .*checkpoint-1000"),
        (["tokenizer.model"], "a tokenizer without a model", "Download"),
        (["model_index.json"], "diffusers", "Mixtral"),
    ],
)  # fmt: skip
def test_a_folder_without_a_model_is_named(tmp_path, names, what, remedy):
    with pytest.raises(CheckpointError, match=f"{what}.*{remedy}"):
        resolve(folder(tmp_path / "it", *names))


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_is_named_with_its_base(tmp_path, config):
    names = ["adapter_model.safetensors", "tokenizer.json", *(["config.json"] if config else [])]
    lora = folder(tmp_path / "lora", *names)
    base = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})
    (lora / "adapter_config.json").write_text(base)
    assert resolve(lora, need="tokenizer") == lora
    from qmix.formats.files.shard_index import read_headers

    with pytest.raises(CheckpointError, match=r"LoRA adapter.*qmix quantize org/base OUT --adapt"):
        read_headers(resolve(lora))


def test_a_file_where_a_folder_is_meant_is_named(tmp_path):
    model = folder(tmp_path / "m", "config.json", "model.safetensors", "tokenizer.model", "a.zip")
    for name in ("config.json", "model.safetensors"):
        with pytest.raises(
            CheckpointError, match=f"a file of a checkpoint.*Give its folder: {model}"
        ):
            resolve(model / name)
    with pytest.raises(CheckpointError, match=r"an archive.*Unpack it"):
        resolve(model / "a.zip")
    (model / "sha256-0123").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(CheckpointError, match=r"a GGUF file without its suffix.*ln -s"):
        resolve(model / "sha256-0123")
    assert resolve(model / "tokenizer.model", need="tokenizer") == model / "tokenizer.model"


def test_an_adapter_beside_a_model_is_not_used_and_that_is_said(small_checkpoint, capsys):
    (small_checkpoint / "adapter_config.json").write_text("{}")
    (small_checkpoint / "adapter_model.safetensors").write_bytes(b"")
    assert sources.local(small_checkpoint) == small_checkpoint
    assert "the adapter beside the model is not used" in capsys.readouterr().err


def test_a_config_with_a_byte_order_mark_is_read(small_checkpoint):
    path = small_checkpoint / "config.json"
    text = path.read_text()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert MixtralConfig.from_pretrained(small_checkpoint).to_json() == text
