"""An output is replaced whole, and only if qmix wrote all of it; every interruption is repaired."""

import errno
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest

from qmix.errors import CheckpointError, ResourceError, UsageError
from qmix.files import file_errors
from qmix.formats.files import manifest, output_dir, replacement


class Killed(BaseException):
    """What a killed process does not survive: nothing but the tests catches it."""


def write(out, content, **options):
    with output_dir.partial(out, **options) as folder:
        (folder / "config.json").write_text(content)
        (folder / "model.safetensors").write_text(content)
        manifest.write_manifest(folder, {"qmix": "test"})


def content(out):
    assert manifest.is_complete(out)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        manifest.MANIFEST,
    }
    return (out / "config.json").read_text()


@pytest.fixture
def out(tmp_path):
    write(tmp_path / "out", "old")
    return tmp_path / "out"


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(replacement, "_exchanged", lambda *_: False)
    return request.param


def test_force_replaces_what_the_manifest_lists(out, way):
    write(out, "new", force=True)
    assert content(out) == "new"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    "name", ["thesis.json", "lora.safetensors", "README.md", "a folder", "link"]
)
def test_anything_else_is_refused_by_name_and_stays(out, name):
    if name == "a folder":
        (out / name).mkdir()
    elif name == "link":
        (out / "config.json").rename(out / name)
        name = "config.json"
        (out / name).symlink_to(out / "link")
    else:
        (out / name).write_text("mine")
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UsageError, match=name):
        output_dir.check_paths(out.parent / "source", out, force=True)
    with pytest.raises(UsageError, match=name):
        write(out, "new", force=True)
    assert sorted(path.name for path in out.iterdir()) == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("damage", ["missing", "cut", "no list", "a path"])
def test_without_a_manifest_nothing_is_replaced(out, damage):
    path = out / manifest.MANIFEST
    if damage == "missing":
        path.unlink()
    else:
        path.write_text({"cut": "{", "no list": "{}", "a path": '{"files": {"../x": {}}}'}[damage])
    with pytest.raises(UsageError, match=r"config\.json|manifest"):
        write(out, "new", force=True)
    assert (out / "config.json").read_text() == "old"


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_manifest_that_lists_a_directory_is_refused_before_the_run(out, name):
    path = out / manifest.MANIFEST
    document = json.loads(path.read_text())
    document["files"][name] = document["files"]["config.json"]
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="not a file with its bytes and sha256"):
        output_dir.check_paths(out.parent / "source", out, force=True)


def test_a_foreign_file_in_out_partial_is_refused_by_name(tmp_path):
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / manifest.MARKER).touch()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        write(tmp_path / "out", "new")
    assert (folder / "thesis.txt").is_file()


def interrupted(out, monkeypatch, step):
    """A forced run that ends as if killed before its step number `step`; False if it has fewer."""
    steps = iter(range(step + 1))

    def counted(function):
        def call(*arguments, **options):
            if next(steps, None) in (None, step):
                raise Killed
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        place, finish = replacement.put_in_place, replacement.finish

        def marked(function):
            def call(*arguments):
                for name in ("rename", "unlink", "rmdir", "touch", "mkdir"):
                    patched.setattr(Path, name, counted(real[name]))
                patched.setattr(replacement, "_exchanged", counted(exchanged))
                patched.setattr(replacement, "sync_directory", counted(file_errors.sync_directory))
                return function(*arguments)

            return call

        real = {
            name: getattr(Path, name) for name in ("rename", "unlink", "rmdir", "touch", "mkdir")
        }
        exchanged = replacement._exchanged
        patched.setattr(output_dir.replacement, "put_in_place", marked(place))
        patched.setattr(output_dir.replacement, "finish", marked(finish))
        patched.setattr(output_dir, "_remove", lambda _: None)  # a killed process tidies nothing
        try:
            write(out, "new", force=True)
        except Killed:
            return True
    return False


def test_a_run_killed_at_any_step_of_the_replacement_is_repaired_by_the_next(
    tmp_path, monkeypatch, way
):
    step = 0
    while True:
        home = tmp_path / str(step)
        home.mkdir()
        out = home / "out"
        write(out, "old")
        if not interrupted(out, monkeypatch, step):
            break
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            output_dir.check_paths(home / "source", out, force=True)
        found = content(out)
        assert found in ("old", "new"), step
        assert not said or found == "old"
        write(out, "again", force=True)
        assert content(out) == "again", step
        assert list(home.iterdir()) == [out], step
        step += 1
    assert step > (12 if way == "two renames" else 9)


def test_what_was_set_aside_is_named_when_it_is_back(out, monkeypatch):
    monkeypatch.setattr(replacement, "_exchanged", lambda *_: False)
    rename = Path.rename

    def kill_the_second(self, target):
        if self.name == "out.partial":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", kill_the_second)
        with pytest.raises(Killed):
            write(out, "new", force=True)
    assert not out.exists()
    with pytest.warns(UserWarning, match=r"an interrupted run had set it aside .* it is back"):
        output_dir.check_paths(out.parent / "source", out, force=True)
    assert content(out) == "old"


def test_a_file_that_comes_into_out_during_the_exchange_stays(out, monkeypatch):
    exchanged = replacement._exchanged

    def beside_a_user(folder, target):
        (target / "thesis.txt").write_text("mine")
        return exchanged(folder, target)

    monkeypatch.setattr(replacement, "_exchanged", beside_a_user)
    with pytest.warns(UserWarning, match="did not write"):
        write(out, "new", force=True)
    assert content(out) == "new"
    kept = list(out.parent.rglob("thesis.txt"))
    assert [path.read_text() for path in kept] == ["mine"]


def fail(number, *, times=None):
    """A function that fails with an errno, the first `times` times or always."""
    left = [times]

    def call(*_, **__):
        if left[0] is not None:
            left[0] -= 1
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_directory_that_cannot_be_forced_to_the_disk_is_no_error(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            fail(number)()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write(tmp_path / "out", "new")
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", ["sync_directory", "unlink"])
def test_an_error_after_the_rename_says_that_out_stands(tmp_path, monkeypatch, step, number):
    finish = replacement.finish

    def failing(*arguments):
        with monkeypatch.context() as patched:
            target = Path if step == "unlink" else replacement
            patched.setattr(target, step, fail(number))
            finish(*arguments)

    monkeypatch.setattr(replacement, "finish", failing)
    with pytest.raises(ResourceError, match="OUT is complete and stands") as caught:
        write(tmp_path / "out", "new")
    assert str(tmp_path / "out") in str(caught.value)
    assert "kept" not in str(caught.value)
    output_dir.check_paths(tmp_path / "source", tmp_path / "other", force=False)
    with pytest.raises(UsageError, match="OUT exists"):
        output_dir.check_paths(tmp_path / "source", tmp_path / "out", force=False)
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_once_and_does_without(tmp_path, monkeypatch, number):
    monkeypatch.setattr(output_dir.fcntl, "flock", fail(number))
    with pytest.warns(UserWarning, match="has no locks") as said:
        write(tmp_path / "out", "new")
    assert len(said) == 1
    assert content(tmp_path / "out") == "new"


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES]
)
@pytest.mark.parametrize("step", ["block", "rename", "lock"])
def test_every_error_of_the_system_names_the_file_and_what_is_kept(
    tmp_path, monkeypatch, step, number
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        if step == "rename":
            patched.setattr(Path, "rename", fail(number))
        if step == "lock" and number != errno.EACCES:
            patched.setattr(output_dir.fcntl, "flock", fail(number))
        with pytest.raises(ResourceError, match=r"out.*cannot be written; found .*\.") as caught:
            write_and(out, fail(number) if step != "rename" else lambda: None)
    assert os.strerror(number) in str(caught.value)
    assert step == "lock" or "Nothing of this run was kept" in str(caught.value)
    assert not out.exists()
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


def write_and(out, then):
    with output_dir.partial(out) as folder:
        (folder / "config.json").write_text("{}")
        then()


def test_a_file_of_the_source_that_cannot_be_read_is_bad_input(tmp_path):
    with pytest.raises(CheckpointError, match=r"source/x: cannot be read"):
        write_and(tmp_path / "out", (tmp_path / "source" / "x").open)
    assert list(tmp_path.iterdir()) == []
