"""The strict safetensors reader and the streaming writer, against the format's own library."""

import json
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, QmixError
from qmix.formats.files import shard_names, shards
from qmix.formats.files.safetensors_header import read_headers
from qmix.formats.files.shards import Planned


def opened(directory):
    return shards.Shards.of(directory, read_headers(directory))


def planned(tensors):
    return [Planned(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(path, tensors):
    with shards.ShardWriter(path, planned(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "blob": torch.arange(7, dtype=torch.uint8),
    "b": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "none": torch.empty(0, 4, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.float16),
}


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path / "x.safetensors", TENSORS)
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])
        assert tensor.dtype == TENSORS[name].dtype
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    files = opened(tmp_path)
    assert files.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor)
        assert files.read(name).shape == tensor.shape


def test_every_tensor_is_aligned_and_the_bytes_are_golden(tmp_path):
    import hashlib

    write(tmp_path / "model.safetensors", TENSORS)
    for name, entry in shards.read_header(tmp_path / "model.safetensors").items():
        assert entry.start % TENSORS[name].element_size() == 0, name
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert digest == GOLDEN


GOLDEN = "6ba92fd2d93659189c160dbdcc542320d63299d399a45703889f68ded9debecd"


def test_shards_hold_at_most_the_limit_and_the_index_lists_all(tmp_path):
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    groups = [[Planned(n, t.dtype, tuple(t.shape))] for n, t in tensors.items()]
    shards.write_shards(tmp_path, groups, ({n: t} for n, t in tensors.items()), 1000)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert names == [shard_names.shard_name(i, 4) for i in range(4)]
    assert all(os.path.getsize(tmp_path / n) < 1000 + 400 for n in names)
    files = opened(tmp_path)
    assert all(torch.equal(files.read(n), t) for n, t in tensors.items())


def header(path, document, data=b""):
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

BAD_HEADERS = {
    "empty file": b"",
    "seven bytes": b"\0" * 7,
    "header longer than file": struct.pack("<Q", 1000) + b"{}",
    "enormous header": struct.pack("<Q", 2**63) + b"{}",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n" + b" " * 64,
    "html": b"<!doctype html><html>" + b" " * 64,
    "zip": b"PK\x03\x04" + b" " * 64,
    "pickle": b"\x80\x02}q\x00." + b" " * 64,
    "gzip": b"\x1f\x8b\x08" + b" " * 64,
}
BAD_DOCUMENTS = {
    "not an object": (b"[1]", b""),
    "leading space": (b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "truncated data": ({"a": F32}, b"123"),
    "trailing byte": ({"a": F32}, b"12345"),
    "unknown dtype": ({"a": {**F32, "dtype": "F8_X"}}, b"1234"),
    "negative offset": ({"a": {**F32, "data_offsets": [-4, 0]}}, b"1234"),
    "float offset": ({"a": {**F32, "data_offsets": [0, 4.0]}}, b"1234"),
    "bool shape": ({"a": {**F32, "shape": [True]}}, b"1234"),
    "reversed offsets": ({"a": {**F32, "data_offsets": [4, 0]}}, b"1234"),
    "shape mismatch": ({"a": {**F32, "shape": [2]}}, b"1234"),
    "overflowing shape": ({"a": {**F32, "shape": [2**61, 2**61]}}, b"1234"),
    "extra field": ({"a": {**F32, "offset": 1}}, b"1234"),
    "hole": ({"a": {**F32, "data_offsets": [4, 8]}}, b"12345678"),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, b"123456"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
    ),
    "number metadata": ({"__metadata__": {"a": 1}, "a": F32}, b"1234"),
    "bad utf-8": (b'{"\xff":{}}', b""),
    "deep nesting": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b""),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_files_that_are_no_safetensors_are_named(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(BAD_HEADERS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened(tmp_path)


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_headers_that_lie_are_refused(tmp_path, name):
    header(tmp_path / "model.safetensors", *BAD_DOCUMENTS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened(tmp_path)


@given(data=st.data())
def test_a_damaged_file_is_refused_or_reads_as_the_library_reads_it(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    path = folder / "model.safetensors"
    save_file({"a": torch.arange(4.0), "b": torch.arange(3, dtype=torch.uint8)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(len(raw) - 3, len(raw))) :]
    path.write_bytes(raw)
    try:
        files = opened(folder)
        ours = {name: files.read(name) for name in files.entries}
    except QmixError:
        return
    theirs = load_file(path)  # what we accept, the library accepts
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(
            tensor.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)
        )


@pytest.mark.parametrize("length", [0x280, 0x8B1F, 0x3C + 256])
def test_a_header_length_may_look_like_another_formats_first_bytes(tmp_path, length):
    raw = json.dumps({"a": F32}).encode().ljust(length)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + raw + b"1234")
    assert opened(tmp_path).entries.keys() == {"a"}


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
        opened(tmp_path)


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
        opened(tmp_path)


def test_an_unlisted_shard_is_refused_but_mistrals_own_file_is_not(tmp_path):
    indexed(tmp_path, {"a": "one.safetensors"})
    save_file({"z": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert opened(tmp_path).entries.keys() == {"a"}
    save_file({"z": torch.zeros(1)}, tmp_path / "stray.safetensors")
    with pytest.raises(CheckpointError, match=r"stray\.safetensors"):
        opened(tmp_path)


def test_links_may_not_leave_the_directory_except_into_the_hub_cache(tmp_path):
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.zeros(2)}, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves the directory"):
        opened(folder)
    snapshot = tmp_path / "hub" / "snapshots" / "rev"
    blobs = tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    outside.rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert opened(snapshot).entries.keys() == {"a"}


def test_pipes_directories_and_loops_are_refused_without_blocking(tmp_path):
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        opened(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        opened(tmp_path)


def test_pickles_are_never_opened(tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    with pytest.raises(QmixError, match="never unpickles"):
        opened(tmp_path)
    assert not canary.exists()


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_signal(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    files = opened(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(CheckpointError, match="ends early"):
        files.read("a")
