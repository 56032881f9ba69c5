"""Files that go along with a message, and those that cannot."""

import os

import pytest

from qmix.commands.chat import attached_file
from qmix.commands.chat.attached_file import attached
from qmix.errors import CheckpointError, UsageError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a file.py"
    path.write_text("".join(f"line {number}\n" for number in range(1, 21)))
    return path


@pytest.mark.parametrize(
    ("lines", "expected"), [("3", (3, 3)), ("10-12", (10, 12)), ("19-99", (19, 20))]
)
def test_some_lines_of_a_file(path, lines, expected):
    file = attached(f"{path} {lines}")
    first, last = expected
    assert file.text == "".join(f"line {number}\n" for number in range(first, last + 1))
    assert str(first) in file.name


def test_the_whole_file_in_a_fence_that_it_does_not_contain(path):
    assert attached(str(path)).block == f"{path}:\n```\n{path.read_text()}```\n"
    path.write_text("a\n````py\nb")
    assert attached(str(path)).block == f"{path}:\n`````\na\n````py\nb\n`````\n"


def test_a_file_whose_name_ends_in_a_number_is_a_file(tmp_path):
    path = tmp_path / "log 12"
    path.write_text("text")
    assert attached(str(path)).text == "text"


def test_invalid_bytes_are_counted_and_windows_line_ends_are_none(path):
    path.write_bytes(b"\xef\xbb\xbfa\xff\xfe\r\nb\xef\xbf\xbd\n")
    file = attached(str(path))
    assert (file.text, file.damaged) == ("a\ufffd\ufffd\nb\ufffd\n", 2)


@pytest.mark.parametrize("lines", ["0", "5-2", "21", "21-30", "99999999999999999999"])
def test_lines_that_are_not_there(path, lines):
    with pytest.raises(UsageError, match="no"):
        attached(f"{path} {lines}")


def test_what_is_no_text_file_is_refused(path, tmp_path, monkeypatch):
    path.write_bytes(b"a\0b")
    with pytest.raises(CheckpointError, match="NUL"):
        attached(str(path))
    with pytest.raises(CheckpointError, match="a directory"):
        attached(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such file"):
        attached(f"{tmp_path}/none 1-2")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="named pipe"):
        attached(str(tmp_path / "pipe"))
    with pytest.raises(UsageError, match="not a file name"):
        attached("a\0b")
    monkeypatch.setattr(attached_file, "LIMIT_BYTES", 100)
    path.write_bytes(b"x" * 101 + b"\nshort\n")
    for argument in (f"{path}", f"{path} 1"):
        with pytest.raises(UsageError, match="too much"):
            attached(argument)
    assert attached(f"{path} 2").text == "short\n"
