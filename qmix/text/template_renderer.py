"""Chat templates rendered in a process of their own, started at the first one and kept.

Whatever a template does, it ends in a text or in one error, within seconds. Knows nothing of what a
conversation means.
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

from qmix.errors import CheckpointError, ResourceError, UsageError

# Its search path is this process's, and nothing else is taken over.
_START = """
import json, runpy, sys
sys.path[:] = json.loads(sys.argv[1])
runpy.run_path(sys.argv[2], run_name="__main__")
"""
_KEPT = ("LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TZ", "TZDIR")  # of the environment
_WALL_SECONDS = 60.0  # the processor's seconds are the worker's own limit
_REPLY_BYTES = 128 << 20
REMEDY = "Correct the template, or give another: a name, a file, or inst for [INST]."


class TemplateRenderer:
    """Renders templates; threads wait for each other. A copy starts a process of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def __reduce__(self) -> tuple[type["TemplateRenderer"], tuple[()]]:
        return TemplateRenderer, ()

    def render(self, template: str, variables: Mapping[str, Any], where: str) -> str:
        """The text that a template makes of its variables.

        Args:
            variables: numbers, strings, lists and dicts; `messages` is one of them.
            where: names the template in errors.

        Raises:
            UsageError: the template refuses the conversation; the error says why.
            CheckpointError: it is no template, fails, or takes too long or too much memory.
            ResourceError: no process can be started.
        """
        request = json.dumps({"template": template, "variables": dict(variables)}).encode()
        with self._lock:
            reply = self._answered(request, where)
        if "text" in reply:
            return str(reply["text"])
        if "refused" in reply:
            raise UsageError(
                "the chat template refuses the conversation",
                where=where,
                found=repr(reply["refused"]),
            )
        what = "cannot be parsed" if "syntax" in reply else "fails"
        found = str(reply.get("syntax") or reply.get("failed"))
        raise CheckpointError(f"the chat template {what}", where=where, found=found, remedy=REMEDY)

    def _answered(self, request: bytes, where: str) -> dict[str, Any]:
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
            raise CheckpointError(
                "the chat template fails", where=where, found=found, remedy=REMEDY
            ) from None
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            if self._process.poll() is None:
                return self._process
            self._stop()
        worker = Path(__file__).with_name("template_worker.py")
        paths = json.dumps([os.path.abspath(path) for path in sys.path if path])
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _START, paths, str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _KEPT if name in os.environ},
                start_new_session=True,  # Ctrl-C stops a reply, and not this process
            )
        except OSError as error:
            raise ResourceError(
                "no process for the chat template", found=error.strerror or str(error)
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
