"""A file is written whole or not at all."""

import os
import re
import stat

import pytest

from qmix import strict_json
from qmix.errors import WriteError
from qmix.files import atomic_file


def test_a_new_file_and_a_replaced_one_are_whole_and_stand_alone(tmp_path):
    path = tmp_path / "x.bin"
    atomic_file.write(path, b"first")
    atomic_file.write(path, memoryview(b"second"))
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path, monkeypatch, failure, step
):
    path = tmp_path / "x.bin"
    atomic_file.write(path, b"first")

    def fail(*_):
        raise failure

    # The module's own os and Path: what is replaced is undone before the folder is looked at.
    with monkeypatch.context() as patched:
        target = os if step == "fsync" else type(path)
        patched.setattr(target, step, fail)
        with pytest.raises(type(failure)):
            atomic_file.write(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_data_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    path, order = tmp_path / "x.bin", []
    fsync, replace = os.fsync, type(path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        type(path), "replace", lambda self, to: (order.append("rename"), replace(self, to))
    )
    atomic_file.write(path, b"data")
    assert order == ["fsync", "rename"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        atomic_file.write(tmp_path / "ours", b"")
        (tmp_path / "any").write_bytes(b"")
    finally:
        os.umask(before)
    ours, any_file = ((tmp_path / name).stat().st_mode for name in ("ours", "any"))
    assert stat.S_IMODE(ours) == stat.S_IMODE(any_file)


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(WriteError, match=r"missing/x\.bin"):
        atomic_file.write(tmp_path / "missing" / "x.bin", b"")


def test_json_is_written_so_that_the_strict_reader_reads_it(tmp_path):
    document = {"b": [1, 2.5, None, True], "a": {"text": "ü"}}
    for indent in (2, None):
        strict_json.write(tmp_path / "x.json", document, indent=indent)
        assert strict_json.read(tmp_path / "x.json") == document
    assert (tmp_path / "x.json").read_bytes().isascii()


def test_a_made_folder_comes_with_those_above_it_and_may_stand_already(tmp_path):
    folder = tmp_path / "a" / "b"
    assert atomic_file.made_folder(str(folder)) == folder
    assert atomic_file.made_folder(folder).is_dir()


def test_a_file_in_the_way_of_a_folder_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "x"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(WriteError, match=rf"^{re.escape(str(folder))}: cannot be written"):
            atomic_file.made_folder(folder)
    assert file.is_file()


def test_parts_become_one_file_and_none_if_one_cannot_be_made(tmp_path):
    path = tmp_path / "x.bin"
    atomic_file.write_parts(path, iter([b"one", memoryview(b"two")]))
    assert path.read_bytes() == b"onetwo"

    def parts():
        yield b"more"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        atomic_file.write_parts(path, parts())
    assert path.read_bytes() == b"onetwo"
    assert list(tmp_path.iterdir()) == [path]
