"""Files that qmix keeps for its user: where they lie, who may read them, and which are believed."""

import os
import stat

import pytest

from qmix.errors import CheckpointError, WriteError
from qmix.experts import heat_file
from qmix.files import user_files
from qmix.planning import machine
from qmix.planning.machine import Measured


@pytest.fixture
def path(tmp_path):
    tmp_path.chmod(0o700)
    file = tmp_path / "cache" / "qmix" / "file.json"
    user_files.prepare(file)
    file.write_text("{}")
    file.chmod(0o600)
    return file


def test_directories_are_the_users_alone(path):
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert user_files.doubt(path) is None
    assert user_files.doubt(path.with_name("missing")) is None


@pytest.mark.parametrize("mode", [0o660, 0o606, 0o666])
def test_a_file_that_others_can_write_is_doubted(path, mode):
    path.chmod(mode)
    assert user_files.doubt(path) == f"others can write to {path}"


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_that_others_can_write_is_doubted(path, mode, level):
    folder = path.parents[level]
    folder.chmod(mode)
    assert user_files.doubt(path) == f"others can write to {folder}"
    with pytest.raises(WriteError, match="others can write to"):
        user_files.prepare(path)


def test_a_sticky_directory_is_as_good_as_tmp(path):
    path.parent.chmod(0o1777)
    assert user_files.doubt(path) is None


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_link_is_doubted(path, level):
    part = (path, *path.parents)[level]
    real = part.rename(part.with_name("real"))
    part.symlink_to(real)
    assert user_files.doubt(path) == f"{part} is a link to {real}"


def test_a_link_further_up_is_as_good_as_where_it_leads(path, tmp_path):
    home = tmp_path.parent / f"{tmp_path.name}-home"
    home.symlink_to(tmp_path)
    linked = home / path.relative_to(tmp_path)
    assert user_files.doubt(linked) is None
    tmp_path.chmod(0o777)
    assert "others can write to" in user_files.doubt(linked)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_what_belongs_to_another_user_is_doubted(path, level):
    part = (path, *path.parents)[level]
    os.chown(part, 12345, 12345)
    assert user_files.doubt(path) == f"{part} belongs to another user"


def test_a_relative_path_and_a_pipe_are_doubted(path):
    assert "absolute" in user_files.doubt(path.relative_to(path.parents[2]))
    os.mkfifo(path.with_name("pipe"), 0o600)
    assert "regular" in user_files.doubt(path.with_name("pipe"))


def test_relative_variables_are_ignored(tmp_path):
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "relative", "XDG_STATE_HOME": "relative"}
    assert user_files.cache_directory(home) == tmp_path / ".cache" / "qmix"
    assert user_files.state_directory(home) == tmp_path / ".local" / "state" / "qmix"
    assert user_files.cache_directory({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "qmix"
    assert user_files.cache_directory({"HOME": "relative"}).is_absolute()
    assert user_files.cache_directory({}).is_absolute()


def test_measurements_that_others_can_have_written_are_ignored_and_not_written(path):
    file = machine.save(Measured(key="a", host_read=1e9), path.with_name("machine.json"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert machine.measurements("a", file).measured is not None
    path.parent.chmod(0o777)
    found = machine.measurements("a", file)
    assert found.measured is None
    assert "may come from another user" in found.trouble
    with pytest.raises(WriteError):
        machine.save(Measured(key="a", host_read=2e9), file)


def test_heat_that_others_can_have_written_is_ignored_and_not_written(path):
    file = path.with_name("heat.json")
    heat_file.save(file, [1, 2], model="m")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert heat_file.read(file, experts=2, model="m") == [1, 2]
    file.chmod(0o622)
    with pytest.raises(CheckpointError, match="may come from another user"):
        heat_file.read(file, experts=2, model="m")
    with pytest.warns(UserWarning, match="Starting without it"):
        assert heat_file.read_if_good(file, experts=2, model="m") is None
    path.parent.chmod(0o777)
    with pytest.raises(WriteError):
        heat_file.save(file, [3, 4], model="m")
