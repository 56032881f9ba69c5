"""A text file as a part of a message: fenced, under its name. Knows no model."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from qmix.errors import CheckpointError, UsageError
from qmix.files import regular_file

# More text than any context holds: 32,768 tokens have about 130 kB.
LIMIT_BYTES = 4 << 20
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LINES = re.compile(r"(.+?)\s+(\d+)(?:-(\d+))?\s*")


@dataclass(frozen=True)
class AttachedFile:
    """A file's text, or some of its lines.

    Attributes:
        name: as the model sees it, with the lines if not all are there.
        damaged: how many invalid bytes became U+FFFD.
    """

    name: str
    text: str
    damaged: int = 0

    @property
    def block(self) -> str:
        """The text in a fence that it does not contain."""
        longest = max((len(run) for run in re.findall("`+", self.text)), default=0)
        fence = "`" * max(3, longest + 1)
        end = "" if self.text.endswith("\n") else "\n"
        return f"{self.name}:\n{fence}\n{self.text}{end}{fence}\n"


def attached(argument: str) -> AttachedFile:
    """The file that `PATH` or `PATH FIRST-LAST` names; the first line is 1, the last one belongs.

    Raises:
        UsageError: lines that the file does not have; more text than a message may have.
        CheckpointError: the file is missing, cannot be read, is not a regular file, or no text.
    """
    found = _LINES.fullmatch(argument)
    path, first, last = user_path(argument), 1, None
    if found is not None and not regular_file.exists(path):
        path, first = user_path(found[1]), _line(found[2])
        last = _line(found[3]) if found[3] else first
        if not 1 <= first <= last:
            raise UsageError("no lines", where=argument, expected="FIRST-LAST, from 1 up")
    data = _read(path, first, last)
    if b"\0" in data:
        raise CheckpointError("not a text file", where=str(path), found="NUL bytes")
    text = data.decode("utf-8-sig", errors="replace")
    damaged = text.count(_REPLACEMENT) - data.count(_REPLACEMENT.encode())
    name = str(path) if last is None else f"{path}, lines {first} to {last}"
    return AttachedFile(name, text.replace("\r\n", "\n"), damaged)


def user_path(text: str) -> Path:
    """A path as a person writes it, with ~ for the home.

    Raises:
        UsageError: no file can have this name.
    """
    if "\0" in text:
        raise UsageError("not a file name", where=text[:80])
    return Path(os.path.expanduser(text))


def _line(digits: str) -> int:
    return int(digits[:12])


def _read(path: Path, first: int, last: int | None) -> bytes:
    """The bytes of a file, or of some of its lines; never many more than a message may have."""
    with regular_file.open_regular(path) as file:
        if last is None:
            data = file.read(LIMIT_BYTES + 1)
        else:
            for number in range(1, first):
                if not _skipped_line(file):
                    raise _no_line(path, number, first)
            data = b"".join(_lines(file, last - first + 1))
            if not data:
                raise _no_line(path, first, first)
    if len(data) > LIMIT_BYTES:
        raise UsageError(
            "too much for a message",
            where=str(path),
            expected=f"at most {LIMIT_BYTES >> 20} MiB",
            remedy="Give its lines: /file PATH 10-40.",
        )
    return data


def _no_line(path: Path, number: int, found: int) -> UsageError:
    return UsageError("no such line", where=str(path), expected=f"up to {number - 1}", found=found)


def _skipped_line(file: BufferedReader) -> bool:
    """Read to the end of a line, however long it is; False at the end of the file."""
    while chunk := file.readline(LIMIT_BYTES):
        if chunk.endswith(b"\n"):
            return True
    return False


def _lines(file: BufferedReader, count: int) -> Iterator[bytes]:
    """The next lines, until they are too much."""
    left = LIMIT_BYTES + 1
    while count and left and (chunk := file.readline(left)):
        yield chunk
        left -= len(chunk)
        count -= chunk.endswith(b"\n")
