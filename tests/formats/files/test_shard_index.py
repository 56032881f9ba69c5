"""Which files a checkpoint directory may consist of: its index, its links, its kinds of files."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from qmix.errors import CheckpointError, QmixError
from qmix.formats.files import shard_names
from qmix.formats.files.shard_index import read_headers


def indexed(tmp_path, weight_map):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / shard_names.INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    ["../one.safetensors", "/etc/one.safetensors", "C:\\one.safetensors", "..\\one.safetensors",
     "x/one.safetensors", "", "one.bin", "\0.safetensors", "n" * 10_000 + ".safetensors", 5, None],
)  # fmt: skip
def test_an_index_cannot_leave_the_directory(tmp_path, name):
    indexed(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "one.safetensors", "c": "two.safetensors"}, r"two\.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "missing b"),
        ({"b": "one.safetensors"}, "missing b"),
        ({}, "weight_map"),
    ],
)
def test_an_index_must_list_exactly_what_the_files_hold(tmp_path, weight_map, named):
    indexed(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=named):
        read_headers(tmp_path)


BESIDE = (
    *("._model.safetensors", ".DS_Store", "._model.safetensors.index.json"),
    *("consolidated.safetensors", "adapter_model.safetensors", "lora_adapter.safetensors"),
    *("optimizer.safetensors", "optimizer.pt", "rng_state_0.pth", "training_args.bin"),
)


@pytest.mark.parametrize("index", [True, False])
def test_what_lies_beside_the_model_is_not_read(tmp_path, index):
    if index:
        indexed(tmp_path, {"a": "one.safetensors"})
        save_file({"z": torch.zeros(1)}, tmp_path / "an-older-name.safetensors")
    else:
        save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    for name in BESIDE:
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert read_headers(tmp_path).keys() == {"a"}


def test_a_shard_of_the_series_that_the_index_does_not_list_is_refused(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    indexed(tmp_path, {"a": first})
    (tmp_path / "one.safetensors").rename(tmp_path / first)
    save_file({"b": torch.zeros(2)}, tmp_path / second)
    with pytest.raises(CheckpointError, match=f"does not list every shard; found {second}"):
        read_headers(tmp_path)


def test_links_are_followed_wherever_they_lead(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.zeros(2)}, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    assert read_headers(folder).keys() == {"a"}
    snapshot, disk = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "another-disk"
    snapshot.mkdir(parents=True)
    disk.mkdir()
    (snapshot.parent.parent / "blobs").symlink_to(disk)
    outside.rename(disk / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert read_headers(snapshot).keys() == {"a"}
    (disk / "0123").unlink()
    with pytest.raises(CheckpointError, match=r"leads nowhere.*Download it again"):
        read_headers(snapshot)


def test_pipes_directories_and_loops_are_refused_without_blocking(tmp_path):
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_headers(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_headers(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_headers(tmp_path)


def test_pickles_are_never_read_headers(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    with pytest.raises(QmixError, match="never unpickles"):
        read_headers(tmp_path)
    assert not canary.exists()
