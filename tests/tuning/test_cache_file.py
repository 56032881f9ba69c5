"""tuning.json: found again by all of its key, and by nothing less."""

import json
import os
from dataclasses import fields, replace

import pytest

from qmix.errors import WriteError
from qmix.tuning import cache_file
from qmix.tuning.cache_file import Entry, TuningKey

KEY = TuningKey(
    gpu="NVIDIA H100", capability="9.0", driver="570.86", triton="3.6.0", kernels="abc", shapes="8x7B"
)  # fmt: skip
ENTRY = Entry(
    key=KEY, tuning={"down": {"warps": 1}}, microseconds=90.0, untuned=100.0, complete=True,
    date="2026-01-02",
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "tuning.json"


def test_it_is_found_again(path):
    assert cache_file.load(path).of(KEY) is None
    assert cache_file.save(ENTRY, path) == path
    found = cache_file.load(path)
    assert found.of(KEY) == ENTRY
    assert found.trouble is None
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", [field.name for field in fields(TuningKey)])
def test_another_key_is_another_entry(name, path):
    other = replace(KEY, **{name: "other"})
    cache_file.save(ENTRY, path)
    assert cache_file.load(path).of(other) is None
    assert KEY.is_of_same_card(other) == (name == "shapes")
    cache_file.save(replace(ENTRY, key=other, microseconds=80.0), path)
    found = cache_file.load(path)
    assert (found.of(KEY).microseconds, found.of(other).microseconds) == (90.0, 80.0)
    cache_file.save(replace(ENTRY, microseconds=70.0), path)
    assert [entry.microseconds for entry in cache_file.load(path).entries] == [80.0, 70.0]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", b'{"version": 2, "tunings": []}', b'{"version": 1, "tunings": [1]}',
        b'{"version": 1, "tunings": [{}]}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_ignored_and_written_anew(content, path):
    path.parent.mkdir()
    path.write_bytes(content)
    found = cache_file.load(path)
    assert found.of(KEY) is None
    assert "(ignored)" in found.trouble
    cache_file.save(ENTRY, path)
    assert cache_file.load(path).of(KEY) == ENTRY


@pytest.mark.parametrize(
    "change",
    [
        {"microseconds": 0}, {"microseconds": "9"}, {"untuned": True}, {"tuning": []}, {"complete": 1},
        {"date": None}, {"key": {}}, {"key": {**vars(KEY), "gpu": 1}}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_an_odd_entry_is_no_entry(change, path):
    cache_file.save(ENTRY, path)
    document = json.loads(path.read_text())
    document["tunings"][0] |= change
    path.write_text(json.dumps(document))
    assert "not a file of tunings" in cache_file.load(path).trouble


def test_a_file_that_others_can_write_is_not_believed(path):
    cache_file.save(ENTRY, path)
    path.chmod(0o666)
    assert "another user" in cache_file.load(path).trouble


def test_a_folder_that_cannot_be_written_says_so_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        cache_file.save(ENTRY, tmp_path / "file" / "tuning.json")
    assert os.listdir(tmp_path) == ["file"]


def test_the_hash_is_that_of_the_sources(tmp_path, monkeypatch):
    first = cache_file.kernel_hash()
    for folder in cache_file._HASHED:
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(cache_file, "_PACKAGE", tmp_path)
    source = tmp_path / "kernels" / "gpu" / "moe_triton.py"
    hashes = {first}
    for content in ("a", "b"):
        source.write_text(content)
        cache_file.kernel_hash.cache_clear()
        hashes.add(cache_file.kernel_hash())
    cache_file.kernel_hash.cache_clear()
    assert len(hashes) == 3
