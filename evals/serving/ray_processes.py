"""A Ray cluster on 127.0.0.1 and `qmix serve --ray` on it, each a process of its own.

Knows nothing of callers.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qmix.errors import ResourceError
from qmix.evals.serving.http_call import Address
from qmix.evals.serving.ports import free_port, listens

_PATIENCE_S = 600.0
_POLL_S = 0.2
# The title of a process that holds a model; before, it names what makes the replica.
_REPLICA = re.compile(r"ray::ServeReplica:(?!.*(__init__|initialize))")
# A busy machine takes longer to start processes than Ray waits.
_PATIENT = {
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
_ANNOUNCED = re.compile(r"serving \S+ at http")


@dataclass(frozen=True)
class RayProcesses:
    """A cluster of one machine.

    Attributes:
        leader: the process whose descendants are the cluster.
        environment: by which others join it.
        folder: for what processes write.
    """

    leader: "subprocess.Popen[bytes]"
    environment: Mapping[str, str]
    folder: Path

    def replicas(self) -> list[int]:
        """The processes that hold a model."""
        found = []
        for number in _descendants(self.leader.pid):
            with suppress(OSError):
                if _REPLICA.match(Path(f"/proc/{number}/cmdline").read_text()):
                    found.append(number)
        return sorted(found)

    def kill_replica(self) -> int:
        """End one by SIGKILL. Returns its number."""
        number = self.replicas()[0]
        os.kill(number, signal.SIGKILL)
        return number

    @contextmanager
    def serving(self, address: Address, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        """`qmix serve --ray` with these arguments, once it says that it serves.

        Raises:
            ResourceError: it does not come to it.
        """
        log = self.folder / f"serve-{time.monotonic_ns()}"
        command = (sys.executable, "-m", "qmix", "serve", *arguments, "--ray")
        with _process((*command, "--port", str(address.port)), log, self.environment) as server:
            _until(lambda: bool(_ANNOUNCED.search(log.read_text())), server, log)
            yield server


@contextmanager
def ray_processes(cpus: int) -> Iterator[RayProcesses]:
    """Start a cluster; at the end it is gone.

    Args:
        cpus: that it says it has.

    Raises:
        ResourceError: it does not start.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ray = (sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block")
        options = ("--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={cpus}")
        quiet = ("--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={folder}/ray")
        log = folder / "ray-log"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        with _process((*ray, *options, *quiet), log, {**token, **_PATIENT}) as leader:
            _until(lambda: listens(port), leader, log)
            address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            yield RayProcesses(leader, {**token, **address}, folder)


def until(condition: Callable[[], bool], what: str) -> float:
    """Wait until something holds. Returns the seconds that it took.

    Raises:
        ResourceError: it does not come to hold.
    """
    begun = time.monotonic()
    while not condition():
        if time.monotonic() - begun > _PATIENCE_S:
            raise ResourceError("waited in vain", expected=what)
        time.sleep(_POLL_S)
    return time.monotonic() - begun


@contextmanager
def _process(
    command: tuple[str, ...], log: Path, environment: Mapping[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process; at the end it gets SIGTERM, and what is left of it SIGKILL."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
    try:
        yield process
    finally:
        left = _descendants(process.pid)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        for number in (*left, process.pid):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()


def _until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """
    Raises:
        ResourceError: the process ends before.
    """

    def holds() -> bool:
        if process.poll() is not None and not condition():
            said = log.read_text(errors="replace").strip()[-400:]
            raise ResourceError("it did not start", where=str(process.args)[:200], found=said)
        return condition()

    until(holds, str(process.args)[:200])


def _descendants(leader: int) -> list[int]:
    """The processes that a process started, and those that these started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found, fresh = [], [leader]
    while fresh:
        fresh = [number for number, parent in parents.items() if parent in fresh]
        found += fresh
    return found
