"""A program of ours in a process of its own, with limits: it answers questions, or is ended.

Started at the first question and kept; started anew after its end. What a question is, only the
program knows. Its side is worker_loop.py.
"""

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmix.errors import QmixError, ResourceError

# Its search path is this process's, and nothing else is taken over.
_START = """
import json, runpy, sys
sys.path[:] = json.loads(sys.argv[1])
program = runpy.run_path(sys.argv[3])
runpy.run_path(sys.argv[2])["serve"](sys.stdin.buffer, sys.stdout.buffer, program)
"""
_KEPT = ("LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TZ", "TZDIR")  # of the environment
_WALL_SECONDS = 60.0  # the processor's seconds are the worker's own limit
_REPLY_BYTES = 128 << 20


class EndedWorkerError(QmixError):
    """The program ended without an answer; `found` says how."""


class WorkerProcess:
    """Asks one program; threads wait for each other. A copy starts a process of its own.

    Args:
        program: a file of qmix's with `answer`, CPU_SECONDS and MEMORY_BYTES; it is run by its
            path, beside no other module of qmix.
    """

    def __init__(self, program: Path) -> None:
        self._program = program
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __reduce__(self) -> tuple[type["WorkerProcess"], tuple[Path]]:
        return WorkerProcess, (self._program,)

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The program's answer to a question; both are JSON objects.

        Raises:
            EndedWorkerError: it took too long, or ended.
            ResourceError: no process can be started.
        """
        request = json.dumps(dict(question)).encode()
        with self._lock:
            return self._answered(request)

    def _answered(self, request: bytes) -> dict[str, Any]:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack("<I", len(request)) + request)
            process.stdin.flush()
            deadline = time.monotonic() + _WALL_SECONDS
            (size,) = struct.unpack("<I", _read(process, 4, deadline))
            if size > _REPLY_BYTES:
                raise EOFError
            reply = json.loads(_read(process, size, deadline))
            if not isinstance(reply, dict):
                raise EOFError
        except BaseException as error:
            code = self._stop()
            if not isinstance(error, (EOFError, OSError, ValueError, TimeoutError)):
                raise
            slow = isinstance(error, TimeoutError) or code == -signal.SIGXCPU
            found = "it takes too long" if slow else f"its process ended with {code}"
            raise EndedWorkerError("no answer", found=found) from None
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self._stop()
        loop = Path(__file__).with_name("worker_loop.py")
        paths = json.dumps([os.path.abspath(path) for path in sys.path if path])
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, paths, str(loop), str(self._program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                start_new_session=True,  # Ctrl-C stops a reply, and not this process
            )
        except OSError as error:
            raise ResourceError(
                f"no process for {self._program.stem}", found=error.strerror or str(error)
            ) from None
        self._process, self._owner = process, os.getpid()
        self._finalizer = weakref.finalize(self, _ended, process, self._owner)
        return process

    def _stop(self) -> int | None:
        """End the process; returns its exit code."""
        process, self._process = self._process, None
        self._finalizer.detach()
        return None if process is None else _ended(process, self._owner)


def _read(process: subprocess.Popen[bytes], size: int, deadline: float) -> bytes:
    """Bytes of the process's stdout.

    Raises:
        EOFError: it ended before.
        TimeoutError: they did not come in time.
    """
    assert process.stdout is not None
    descriptor, parts = process.stdout.fileno(), bytearray()
    while len(parts) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise TimeoutError
        part = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def _ended(process: subprocess.Popen[bytes], owner: int) -> int | None:
    """Kill a process that this one started, and close its pipes; returns its exit code."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                continue
    if owner != os.getpid():  # of the parent, before a fork
        return None
    try:
        return process.wait(timeout=0.2)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
