"""ServerProcess: a server started as users start it, and what its process holds.

Knows nothing of its callers.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import ResourceError
from qmix.evals.serving.http_call import Address
from qmix.evals.serving.ports import free_port, listens

_STOP_S = 30.0
_POLL_S = 0.1
_ANNOUNCED = re.compile(r"http://127\.0\.0\.1:(\d+)/v1")


@dataclass(frozen=True)
class Held:
    """What a server holds at a moment, as Linux and the server itself say it.

    Attributes:
        resident: bytes.
        running, waiting: requests.
    """

    resident: int
    descriptors: int
    threads: int
    running: int
    waiting: int


class ServerProcess:
    """A server that answers.

    Attributes:
        address: where it does.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", address: Address) -> None:
        self._process, self.address = process, address

    def held(self) -> Held:
        """What it holds now."""
        folder, counts = Path(f"/proc/{self._process.pid}"), self.metrics()
        status = dict(
            line.split(":", 1)
            for line in (folder / "status").read_text().splitlines()
            if ":" in line
        )
        return Held(
            resident=int(status["VmRSS"].split()[0]) * 1024,
            descriptors=len(list((folder / "fd").iterdir())),
            threads=int(status["Threads"]),
            running=int(counts["qmix_requests_running"]),
            waiting=int(counts["qmix_requests_waiting"]),
        )

    def metrics(self) -> dict[str, float]:
        """Its counts, by their names in /metrics."""
        url = f"http://{self.address.host}:{self.address.port}/metrics"
        with urllib.request.urlopen(url, timeout=_STOP_S) as answer:
            lines = [line.split() for line in answer.read().decode().splitlines()]
        return {line[0]: float(line[1]) for line in lines if line[0].startswith("qmix_")}

    def stop(self) -> tuple[int, float]:
        """End it by SIGTERM: its exit code, and the seconds that it took.

        Raises:
            ResourceError: it does not end.
        """
        begun = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            raise ResourceError("the server does not end", expected=f"{_STOP_S:.0f} s") from None
        return code, time.monotonic() - begun


@contextmanager
def qmix_server(*arguments: str) -> Iterator[ServerProcess]:
    """`qmix serve` with these arguments, on a free port of this machine.

    Raises:
        ResourceError: it does not start.
    """
    command = (sys.executable, "-m", "qmix", "serve", *arguments, "--port", "0")
    with _started(command) as (process, log):
        while not (found := _ANNOUNCED.search(log.read_text(errors="replace"))):
            _wait(process, log)
        yield ServerProcess(process, Address(int(found[1])))


@contextmanager
def llama_server(python: str, *arguments: str) -> Iterator[ServerProcess]:
    """llama-cpp-python's server with these arguments, in an interpreter of its own.

    Raises:
        ResourceError: it does not start.
    """
    port = free_port()
    command = (python, "-m", "llama_cpp.server", "--port", str(port), *arguments)
    with _started(command) as (process, log):
        while not listens(port):
            _wait(process, log)
        yield ServerProcess(process, Address(port))


@contextmanager
def _started(command: Sequence[str]) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """A process and the file into which it writes; at the end it is killed, if it still runs."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            yield process, log
        finally:
            process.kill()
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """
    Raises:
        ResourceError: the process has ended.
    """
    if process.poll() is not None:
        said = log.read_text(errors="replace").strip().rpartition("\n")[2]
        raise ResourceError("the server did not start", where=str(process.args), found=said[:400])
    time.sleep(_POLL_S)
