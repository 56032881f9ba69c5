"""The results of a batch: a line for each prompt, in the prompts' order, appended as they come.

A line is written by one call and ends in a newline, so a process that is killed leaves whole lines
and at most one torn one, which the next run cuts off. Because the order is the prompts', the number
of whole lines says where to go on. Knows no engine.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qmix.errors import UsageError
from qmix.files.file_errors import writing

_BLOCK = 1 << 20


class ResultFile:
    """An open file of results, which no other process may have open.

    Attributes:
        done: results in it.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.done = 0
        self._path, self._file = path, file

    def go_on(self, key_of: Callable[[int], str | None]) -> None:
        """Cut a torn line off, and check that the others are those of this batch.

        Args:
            key_of: the key of a prompt, asked in order; None if there is no such line.

        Raises:
            UsageError: a result is of another prompt, or was made with other settings.
        """
        whole = 0
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._check(line, key_of(self.done))
            whole += len(line)
            self.done += 1
        with writing(self._path):
            self._file.truncate(whole)
            self._file.seek(whole)

    def append(self, result: Mapping[str, Any]) -> None:
        """Write the next result.

        Raises:
            WriteError: it cannot be written; what is there is whole lines, and perhaps a torn one.
        """
        line = json.dumps(result, ensure_ascii=False) + "\n"
        with writing(self._path):
            self._file.write(line.encode())
            self._file.flush()
        self.done += 1

    def _check(self, line: bytes, key: str | None) -> None:
        try:
            found = json.loads(line)
            same = key is not None and (found["line"], found["key"]) == (self.done, key)
        except (ValueError, TypeError, KeyError):
            same = False
        if not same:
            raise UsageError(
                "the results there are of other prompts or settings",
                where=f"{self._path}: line {self.done + 1}",
                remedy="Give another OUT, or --force to begin anew.",
            )


@contextmanager
def results(path: Path, *, anew: bool) -> Iterator[ResultFile]:
    """Open a file of results, made if it is missing; it is on the disk at the end.

    Args:
        anew: begin with an empty file.

    Raises:
        UsageError: another process has it.
        WriteError: it cannot be written.
    """
    with writing(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+b", buffering=_BLOCK) as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("another process writes there", where=str(path)) from None
        if anew:
            with writing(path):
                file.truncate(0)
        yield ResultFile(path, file)
        with writing(path):
            file.flush()
            os.fsync(descriptor)
