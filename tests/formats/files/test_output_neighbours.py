"""What stands beside OUT, or in its place, survives a run or is refused by name."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from qmix.errors import CheckpointError, QmixError, UsageError
from qmix.formats.files import output_dir, replacement
from tests.support.models import quantized


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_source_whose_name_is_out_with_our_suffix_survives(small_checkpoint, tmp_path, suffix):
    neighbour = small_checkpoint.rename(tmp_path / f"m{suffix}")
    before = contents(neighbour)
    with suppress(UsageError):
        quantized(neighbour, tmp_path / "m")
    assert contents(neighbour) == before


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_directory_that_is_not_ours_beside_out_survives(small_checkpoint, tmp_path, suffix):
    neighbour = tmp_path / f"m{suffix}"
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("years of work")
    with suppress(UsageError):
        quantized(small_checkpoint, tmp_path / "m")
    assert (neighbour / "thesis.txt").read_text() == "years of work"


def test_a_link_named_out_partial_is_not_followed(small_checkpoint, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    (tmp_path / "m.partial").symlink_to(home)
    with suppress(UsageError):
        quantized(small_checkpoint, tmp_path / "m")
    assert contents(home) == {"thesis.txt": b"years of work"}


def test_a_file_named_out_partial_is_refused_by_name(small_checkpoint, tmp_path):
    (tmp_path / "m.partial").write_text("notes")
    with pytest.raises(QmixError, match=r"m\.partial"):
        quantized(small_checkpoint, tmp_path / "m")


def test_a_second_run_in_the_moment_of_the_rename_cannot_empty_the_first_ones_output(
    small_checkpoint, tmp_path, monkeypatch
):
    out, sync, tried = tmp_path / "m", replacement.sync_directory, []

    def sync_beside_a_second_run(folder):
        if not tried:
            tried.append(folder)
            with suppress(CheckpointError), output_dir.partial(out):
                pass
        sync(folder)

    monkeypatch.setattr(replacement, "sync_directory", sync_beside_a_second_run)
    quantized(small_checkpoint, out)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize("out", [".", ".."])
def test_out_by_a_dot_is_refused_as_usage(small_checkpoint_nf4, small_checkpoint, monkeypatch, out):
    (small_checkpoint_nf4 / "sub").mkdir()
    monkeypatch.chdir(small_checkpoint_nf4 if out == "." else small_checkpoint_nf4 / "sub")
    with pytest.raises(UsageError):
        quantized(small_checkpoint, Path(out), force=True)
    assert (small_checkpoint_nf4 / "config.json").is_file()


def test_closing_the_lock_of_a_complete_output_cannot_fail_it(tmp_path, monkeypatch):
    close = os.close

    def failing(descriptor):
        close(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def os_close_fails():
        monkeypatch.setattr(os, "close", failing)

    with output_dir.partial(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        monkeypatch.setattr(replacement, "finish", lambda out, old: os_close_fails())
    assert (tmp_path / "out" / "config.json").is_file()
