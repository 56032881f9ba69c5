"""A model is saved beside what a folder holds: whole, through no link, over no file."""

import errno
import os
from pathlib import Path

import pytest

from qmix.errors import UsageError, WriteError
from qmix.formats.files import replacement
from qmix.models import saving_folder
from tests.support.models import small_model


class Killed(BaseException):
    """What a killed process does not survive."""


@pytest.fixture
def folder(tmp_path):
    """A folder with a user's own files."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("mine")
    (home / "tokenizer_config.json").write_text("{}")
    return home


def write(folder, content="new"):
    with saving_folder.saving(folder) as stage:
        for name in ("a.safetensors", "b.safetensors", "config.json"):
            (stage / name).write_text(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


SAVED = ["a.safetensors", "b.safetensors", "config.json"]
BEFORE = ["thesis.txt", "tokenizer_config.json"]


def test_a_model_is_saved_beside_other_files_and_in_a_new_folder(folder, tmp_path):
    model = small_model(num_hidden_layers=1)
    for target in (folder, tmp_path / "deep" / "new"):
        model.save_pretrained(target)
        assert (target / "config.json").is_file()
    assert {"thesis.txt", "tokenizer_config.json"} <= set(names(folder))
    assert names(tmp_path / "deep") == ["new"]
    assert not [name for name in names(folder) if name.startswith(".")]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
@pytest.mark.parametrize("name", ["config.json", "b.safetensors"])
def test_a_file_or_link_of_the_same_name_is_refused_and_stays(folder, tmp_path, name, kind):
    victim = tmp_path / "victim"
    if kind != "dangling link":
        victim.write_text("precious")
    if kind == "file":
        (folder / name).write_text("precious")
    else:
        (folder / name).symlink_to(victim)
    with pytest.raises(UsageError, match=name):
        write(folder)
    assert names(folder) == sorted([*BEFORE, name])
    assert (folder / name).is_symlink() == (kind != "file")
    assert not victim.exists() or victim.read_text() == "precious"


@pytest.mark.parametrize("step", range(5))
def test_a_save_killed_at_any_step_leaves_no_half_and_the_next_one_completes(
    folder, monkeypatch, step
):
    left = iter(range(step))
    rename = Path.rename

    def kill(self, target):
        if next(left, None) is None:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", kill)
        patched.setattr(saving_folder, "_clear", lambda _: None)  # a killed process tidies nothing
        if step >= len(SAVED):
            patched.setattr(saving_folder.shutil, "rmtree", lambda _: kill(folder, folder))
        try:
            write(folder)
        except Killed:
            assert step <= len(SAVED)
    assert (folder / "config.json").exists() == (step >= len(SAVED))
    if step < len(SAVED):
        write(folder, "again")
        assert (folder / "config.json").read_text() == "again"
    else:
        with pytest.raises(UsageError, match="already holds"):
            write(folder, "again")
        assert (folder / "config.json").read_text() == "new"
    if step <= len(SAVED):
        assert names(folder) == sorted([*BEFORE, *SAVED])


def test_a_new_folder_whose_save_was_killed_after_its_rename_is_tidied_by_the_next(
    tmp_path, monkeypatch
):
    def killed(out, old):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(replacement, "finish", killed)
        with pytest.raises(Killed):
            write(tmp_path / "new")
    assert names(tmp_path / "new") == [".qmix-partial", *SAVED]
    with pytest.raises(UsageError, match="already holds a checkpoint"):
        write(tmp_path / "new")
    assert names(tmp_path / "new") == SAVED


def test_a_file_that_came_in_place_of_one_moved_up_stays(folder, monkeypatch):
    rename = Path.rename
    left = iter(range(1))

    def kill(self, target):
        if next(left, None) is None:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", kill)
        patched.setattr(saving_folder, "_clear", lambda _: None)
        with pytest.raises(Killed):
            write(folder)
    (folder / "mine").write_text("mine")
    (folder / "mine").replace(folder / "a.safetensors")
    with pytest.raises(UsageError, match=r"a\.safetensors"):
        write(folder)
    assert (folder / "a.safetensors").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("new", [False, True])
def test_a_disk_that_fails_leaves_the_folder_as_it_was(folder, tmp_path, number, new):
    def failing(target):
        with saving_folder.saving(target) as stage:
            (stage / "a.safetensors").write_text("half")
            raise OSError(number, os.strerror(number))

    target = tmp_path / "new" if new else folder
    with pytest.raises(WriteError, match=r"Nothing of this .* was kept") as caught:
        failing(target)
    assert os.strerror(number) in str(caught.value)
    assert names(folder) == BEFORE
    assert names(tmp_path) == ["home"]


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "none")
    with pytest.raises(UsageError, match="leads nowhere"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]
