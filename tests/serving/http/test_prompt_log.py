"""Prompts are logged where that is asked for, and a disk that is full ends nothing."""

import errno
import json
import os
import stat

import pytest

from qmix.errors import WriteError
from qmix.serving.http.prompt_log import PromptLog


class Disk:
    """A disk that has room for so many bytes."""

    def __init__(self, room):
        self.room, self.write = room, os.write

    def __call__(self, descriptor, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = data[: self.room]
        self.room -= len(data)
        return self.write(descriptor, data)


def test_a_line_for_each_request(tmp_path):
    path = tmp_path / "prompts"
    log = PromptLog(path)
    for prompt in ("a\nb", "\u00e4"):
        log.put("/v1/completions", {"prompt": prompt})
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["path"], first["body"], second["body"]["prompt"]) == (
        "/v1/completions",
        {"prompt": "a\nb"},
        "\u00e4",
    )
    assert first["time"] > 1.7e9
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.rename(tmp_path / "older")
    log.put("/", {})
    assert len(path.read_text().splitlines()) == 1


def test_a_full_disk_is_said_once_and_later_lines_are_whole(tmp_path, monkeypatch, caplog):
    path, disk = tmp_path / "prompts", Disk(20)
    log = PromptLog(path)
    monkeypatch.setattr("qmix.serving.http.prompt_log.os.write", disk)
    for _ in range(3):
        log.put("/", {"prompt": "lost"})
    disk.room = 1000
    log.put("/", {"prompt": "there"})
    _, last = path.read_text().splitlines()
    assert json.loads(last)["body"] == {"prompt": "there"}
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    log.put("/", {"prompt": "there"})
    assert json.loads(path.read_text().splitlines()[-1])


def test_a_file_that_cannot_be_opened_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(WriteError, match="prompts"):
        PromptLog(tmp_path / "missing" / "prompts")
