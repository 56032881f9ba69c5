"""What reading a tensor promises: no mapped pages, one copy, its own bytes, and no signals."""

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qmix.errors import CheckpointError, QmixError
from qmix.formats.files import shards
from qmix.formats.files.shard_index import read_headers
from tests.support.tensors import TENSORS


def opened(directory):
    return shards.Shards.of(directory, read_headers(directory))


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    files = opened(tmp_path)
    assert files.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor)
        assert files.read(name).shape == tensor.shape


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


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_signal(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    files = opened(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(CheckpointError, match="ends early"):
        files.read("a")


ROWS, COLUMNS = 1024, 4096  # 16 MiB of float32


@pytest.fixture
def entries(tmp_path):
    tensors = {"a": torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)}
    tensors["b"] = torch.arange(100).to(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    return shards.read_entries(tmp_path / "model.safetensors")


def file_pages():
    """Resident pages of mapped files, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024


def test_every_value_is_that_of_the_library_read_by_pread(tmp_path, entries):
    with safe_open(tmp_path / "model.safetensors", "pt", backend="pread") as library:
        assert set(library.keys()) == set(entries)
        for name, entry in entries.items():
            assert torch.equal(shards.read_entry(name, entry), library.get_tensor(name))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks /proc")
def test_the_file_is_never_mapped_and_counts_no_resident_pages(tmp_path, entries, monkeypatch):
    preadv, mapped = os.preadv, []

    def watched(descriptor, buffers, offset):
        mapped.append("model.safetensors" in Path("/proc/self/maps").read_text())
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    shards.read_entry("b", entries["b"])  # what is loaded for the first read is not counted
    before = file_pages()
    data = shards.read_entry("a", entries["a"])
    assert file_pages() - before < data.nbytes // 4
    assert mapped == [False] * len(mapped)
    assert len(mapped) >= 2


def test_given_memory_is_filled_in_place(entries):
    entry = entries["a"]
    arena = torch.empty(entry.nbytes + 64, dtype=torch.uint8)
    data = shards.read_entry("a", entry, lambda nbytes: arena[64 : 64 + nbytes])
    assert data.data_ptr() == arena.data_ptr() + 64
    assert torch.equal(data, shards.read_entry("a", entry))


def test_fresh_memory_starts_at_a_cache_line(entries):
    assert shards.read_entry("a", entries["a"]).data_ptr() % 64 == 0


def test_a_run_of_rows_reads_its_own_bytes_only(entries, monkeypatch):
    entry, preadv, read = entries["a"], os.preadv, []

    def watched(descriptor, buffers, offset):
        done = preadv(descriptor, buffers, offset)
        read.append((offset, offset + done))
        return done

    monkeypatch.setattr(os, "preadv", watched)
    rows = entry.rows(10, 30)
    data = shards.read_entry("a", rows)
    assert (read[0][0], read[-1][1]) == (rows.start, rows.stop)
    assert sum(stop - start for start, stop in read) == 20 * COLUMNS * 4
    monkeypatch.undo()
    assert torch.equal(data, shards.read_entry("a", entry)[10:30])


def test_short_reads_are_continued(entries, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    assert torch.equal(shards.read_entry("b", entries["b"]), torch.arange(100).to(torch.bfloat16))


@pytest.mark.parametrize("left", [0, 1, 5000, -1])
def test_a_file_that_shrinks_is_an_error_that_names_file_and_tensor(tmp_path, entries, left):
    path = tmp_path / "model.safetensors"
    os.truncate(path, left if left >= 0 else path.stat().st_size - 1)
    name = max(entries, key=lambda name: entries[name].stop)
    with pytest.raises(CheckpointError, match="ends early") as error:
        shards.read_entry(name, entries[name])
    assert str(path) in str(error.value)
    assert name in error.value.what


def test_a_file_that_shrinks_between_two_reads_is_an_error(tmp_path, entries, monkeypatch):
    preadv, done = os.preadv, []

    def shrinking(descriptor, buffers, offset):
        done.append(preadv(descriptor, [buffers[0][: 1 << 20]], offset))
        os.truncate(tmp_path / "model.safetensors", entries["a"].start + (1 << 20))
        return done[-1]

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the data of a ends early"):
        shards.read_entry("a", entries["a"])
    assert done == [1 << 20, 0]


def test_a_file_that_is_gone_or_became_a_pipe_is_an_error(tmp_path, entries):
    path = tmp_path / "model.safetensors"
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        shards.read_entry("a", entries["a"])
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        shards.read_entry("a", entries["a"])
