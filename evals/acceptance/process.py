"""The worker as a process of its own: started, asked through stdin, heard through a pipe, killed.

Knows nothing of torch, nor of what the messages mean.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qmix.evals.acceptance.supervisor import Message, WorkerGoneError

_SAID_BYTES = 6000  # of the worker's own output, for the record


class WorkerProcess:
    """A process that reads the names of steps and writes messages, JSON objects, one a line.

    Args:
        command: of the process; the number of the pipe's descriptor is added at its end.
        environment: what to change in this process's.
    """

    def __init__(
        self, command: Sequence[str], *, cwd: Path, environment: dict[str, str] | None = None
    ) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end
        self._pipe, theirs = os.pipe()
        self._buffer = b""
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs)],
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs,),
                start_new_session=True,
            )
        finally:
            os.close(theirs)

    def request(self, step: str) -> None:
        """Begin a step."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # receive says so
            self._process.stdin.write(step.encode() + b"\n")
            self._process.stdin.flush()

    def receive(self, seconds: float) -> Message | None:
        """The next message; None if there is none within `seconds`.

        Raises:
            WorkerGoneError: the process has ended.
        """
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._pipe], [], [], left)[0]:
                return None
            read = os.read(self._pipe, 1 << 16)
            if not read:
                said = self.end()
                code = self._process.returncode
                raise WorkerGoneError(f"{said}\nthe process ended with {_shown(code)}".strip())
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def end(self) -> str:
        """End the process and whatever it started; what it printed last."""
        if self._said.closed:
            return ""
        with suppress(subprocess.TimeoutExpired):  # by itself, if it has closed the pipe
            self._process.wait(0 if self._open() else 1)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:  # open until now, so that its exit code is its own
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        os.close(self._pipe)
        with self._said as said:
            size = said.seek(0, os.SEEK_END)
            said.seek(max(0, size - _SAID_BYTES))
            return said.read().decode(errors="replace").strip()

    def _open(self) -> bool:
        """Whether the process still holds its end of the pipe."""
        return not select.select([self._pipe], [], [], 0)[0] or bool(self._buffer)


def end_with_parent() -> None:
    """End this process, and whatever it started, when nobody can ask it for a step any more.

    A command that is killed cannot end its worker, which would go on with its step beside the
    command that continues the journal, and take memory and time of the same device.
    """
    requests = select.poll()
    requests.register(sys.stdin, 0)  # of no event but the hang-up, which is always told

    def watch() -> None:
        requests.poll()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def python(module: str, *arguments: str) -> list[str]:
    """The command of a module in this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def _shown(code: int) -> str:
    return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
