"""Odd and hostile files of a checkpoint: an error of ours that names them, or no harm."""

import json
import os
import pickle
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

import qmix
from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, QmixError, UnsupportedError
from qmix.formats import open_checkpoint
from tests.support.fast_tokenizers import fast

SHARD = "model-00001-of-00001.safetensors"
IDS = torch.tensor([[1, 5, 6, 7]])


@pytest.mark.parametrize("count", [200_000])  # minutes, if each key were compared with all before
def test_a_duplicate_key_at_the_end_of_a_large_document_is_found(count):
    pairs = ",".join(f'"{index:x}":0' for index in range(count))
    with pytest.raises(CheckpointError, match="appears twice"):
        strict_json.loads(f'{{{pairs},"{count - 1:x}":0}}', where="config.json")


def test_a_config_of_a_quarter_of_a_million_experts_is_refused(small_checkpoint):
    document = json.loads((small_checkpoint / "config.json").read_text())
    document.update(num_hidden_layers=1024, num_local_experts=256)
    (small_checkpoint / "config.json").write_text(json.dumps(document))
    with pytest.raises(QmixError):
        open_checkpoint(small_checkpoint)


@pytest.mark.parametrize(
    "entry", [{"eos_token_id": [None]}, {"eos_token_id": 1 << 70}, {"self": 1}]
)
def test_odd_config_entries_are_an_error_of_ours_or_harmless(small_checkpoint, entry):
    document = {**json.loads((small_checkpoint / "config.json").read_text()), **entry}
    (small_checkpoint / "config.json").write_text(json.dumps(document))
    with suppress(CheckpointError, UnsupportedError):
        model, _ = qmix.load(small_checkpoint, device="cpu")
        model.generate(IDS, max_new_tokens=2)


def test_a_null_dtype_beside_torch_dtype_says_nothing():
    assert MixtralConfig.from_dict({"dtype": None, "torch_dtype": "float16"}).dtype == "float16"


def test_a_quant_state_of_two_dimensions_is_refused(small_checkpoint_nf4):
    file = next(small_checkpoint_nf4.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if "quant_state" in name)
    tensors[name] = tensors[name][None]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="quant_state"):
        qmix.load(small_checkpoint_nf4, device="cpu")


def test_a_pickle_of_todays_protocol_is_called_by_its_name(small_checkpoint):
    (small_checkpoint / SHARD).write_bytes(pickle.dumps({"weights": list(range(1000))}))
    with pytest.raises(CheckpointError, match="a Python pickle"):
        open_checkpoint(small_checkpoint)


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.model"])
def test_a_pipe_in_place_of_a_file_never_blocks(small_checkpoint, name):
    (small_checkpoint / name).unlink()
    os.mkfifo(small_checkpoint / name)
    with pytest.raises(CheckpointError):
        qmix.load(small_checkpoint, device="cpu")


def test_a_hub_cache_of_links_into_its_blobs_is_read(small_checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in small_checkpoint.iterdir():
        path.rename(blobs / f"{path.name}-hash")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-hash")
    model, _ = qmix.load(snapshot, device="cpu")
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 6)


def test_the_companion_files_of_a_real_hub_directory_do_not_disturb(small_checkpoint):
    special = {"0": {"content": "<unk>", "special": True}}
    (small_checkpoint / "tokenizer_config.json").write_text(
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
    (small_checkpoint / "generation_config.json").write_text(
        '{"eos_token_id": [2, 5], "pad_token_id": -1}'
    )
    model = (small_checkpoint / "tokenizer.model").read_bytes()
    (small_checkpoint / "tokenizer.json").write_text(fast(model).to_str())
    (small_checkpoint / "consolidated.safetensors").write_bytes(b"of another layout")
    model, tokenizer = qmix.load(small_checkpoint, device="cpu")
    assert tokenizer.encode("a")[0] == 1
    assert model.generate(IDS, max_new_tokens=2).shape == (1, 6)
