"""The streaming writer of safetensors files and shards, read by the format's own library."""

import hashlib
import os

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qmix.formats.files import shard_names, shard_writer, shards
from qmix.formats.files.shard_index import read_headers
from qmix.formats.tensor_spec import TensorSpec
from tests.support.tensors import TENSORS


def planned(tensors):
    return [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(path, tensors):
    with shard_writer.ShardWriter(path, planned(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path / "x.safetensors", TENSORS)
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.dtype == TENSORS[name].dtype
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_and_the_bytes_are_golden(tmp_path):
    write(tmp_path / "model.safetensors", TENSORS)
    for name, entry in shards.read_entries(tmp_path / "model.safetensors").items():
        assert entry.start % TENSORS[name].element_size() == 0, name
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert digest == GOLDEN


GOLDEN = "6ba92fd2d93659189c160dbdcc542320d63299d399a45703889f68ded9debecd"


def test_shards_hold_at_most_the_limit_and_the_index_lists_all(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    groups = [[TensorSpec(n, t.dtype, tuple(t.shape))] for n, t in tensors.items()]
    shard_writer.write_shards(tmp_path, groups, ({n: t} for n, t in tensors.items()), 1000)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == [shard_names.shard_name(i, 4) for i in range(4)]
    assert all(os.path.getsize(tmp_path / n) < 1000 + 400 for n in names)
    files = shards.Shards.of(tmp_path, read_headers(tmp_path))
    assert all(torch.equal(files.read(n), t) for n, t in tensors.items())
