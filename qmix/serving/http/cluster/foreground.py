"""An application of Ray Serve's that lives as long as this process wants it. Knows no models."""

import logging
import secrets
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from qmix.errors import QmixError, ResourceError

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "qmix"  # of the application; each cluster has one
_LOOK_S = 1.0
# Beyond a request's own time, so that its replica can say that it is over.
_MARGIN_S = 5.0
_PROXY_S = 30.0  # until a proxy answers


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where each machine of the cluster listens.

    Attributes:
        deadline_s: seconds that a request may take in all.
    """

    host: str
    port: int
    deadline_s: float

    @property
    def url(self) -> str:
        """Of the proxy on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class _TerminatedError(Exception):
    """SIGTERM has come."""


def serve(
    application: "Application",
    address: Address,
    *,
    started: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Run the application until SIGTERM, Ctrl-C, or until another run of it takes over.

    For the main thread of a process that has joined a cluster. Where the application runs already,
    Ray replaces its replicas one after another, and the `serve` that began it returns. At the end
    requests that run are waited for; a second signal ends the process at once.

    Args:
        started: called once requests are answered.
        say: called with what Ray tells of a start that takes long.

    Raises:
        QmixError: Ray cannot run it, or has lost it.
        KeyboardInterrupt: it was Ctrl-C.
    """
    from ray import serve as ray_serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # which the import has set
    with _faults():
        is_update = NAME in ray_serve.status().applications
        try:
            with _terminable():
                run = _deployed(application, address, say)
                started()
                while _is_latest(run):
                    time.sleep(_LOOK_S)
            return
        except (QmixError, _TerminatedError, KeyboardInterrupt) as error:
            end = error
        if not (is_update and isinstance(end, QmixError)):  # or replicas of before still answer
            _end()
        if not isinstance(end, _TerminatedError):
            raise end


@contextmanager
def _faults() -> Iterator[None]:
    """
    Raises:
        QmixError: for what Ray raises.
    """
    import ray
    from ray import serve as ray_serve

    try:
        yield
    except (ray.exceptions.RayError, ray_serve.exceptions.RayServeException) as error:
        raise QmixError("Ray Serve failed", found=str(error).strip()[-400:]) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what runs."""

    def ended(_: int, __: FrameType | None) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _deployed(application: "Application", address: Address, say: Callable[[str], None]) -> str:
    """Deploy it and wait until it answers. Returns the name of this run.

    Raises:
        QmixError: it does not come to run, or no proxy answers here.
    """
    import ray
    from ray import serve as ray_serve

    ray_serve.start(
        http_options={
            "host": address.host,
            "port": address.port,
            "request_timeout_s": address.deadline_s + _MARGIN_S,
        }
    )
    target = ray_serve.RunTarget(application, NAME, "/")
    ray_serve.run_many([target], wait_for_applications_running=False)
    run = secrets.token_hex(8)
    ray.get(_latest_run().set.remote(run))
    said = ""
    while True:
        status = ray_serve.status().applications[NAME]
        if status.status == "RUNNING":
            break
        told = " ".join(" ".join(each.message for each in status.deployments.values()).split())
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise QmixError("no replica can run", found=(told or status.message)[-600:])
        if told != said:
            say(told)
            said = told
        time.sleep(_LOOK_S)
    _check_proxy(address)
    return run


def _check_proxy(address: Address) -> None:
    """
    Raises:
        ResourceError: no proxy answers.
    """
    deadline = time.monotonic() + _PROXY_S
    while time.monotonic() < deadline:
        with (
            suppress(OSError),
            urllib.request.urlopen(f"{address.url}/-/healthz", timeout=_LOOK_S),
        ):
            return
        time.sleep(_LOOK_S)
    raise ResourceError(
        "no proxy of Ray Serve answers here",
        where=address.url,
        remedy="If it runs on this cluster already, give the --host and --port that it has.",
    )


class LatestRun:
    """An actor that knows which run of `serve` is the application's latest."""

    def __init__(self) -> None:
        self._run = ""

    def get(self) -> str:
        """Its name."""
        return self._run

    def set(self, run: str) -> None:
        """Another takes over."""
        self._run = run


def _latest_run() -> Any:
    """The cluster's LatestRun: Ray tells when an application was made, not when it was replaced."""
    import ray

    chosen: dict[str, Any] = {"name": NAME, "namespace": NAME, "get_if_exists": True}
    return ray.remote(LatestRun).options(**chosen, lifetime="detached", num_cpus=0).remote()


def _is_latest(run: str) -> bool:
    """Whether no other run has deployed the application since.

    Raises:
        QmixError: somebody has deleted it.
    """
    import ray
    from ray import serve as ray_serve

    if NAME not in ray_serve.status().applications:
        raise QmixError("the application was deleted", where=NAME)
    return bool(ray.get(_latest_run().get.remote()) == run)


def _end() -> None:
    """Take no more requests, wait for those that run, and leave the cluster as it was."""
    import ray
    from ray import serve as ray_serve

    if ray_serve.status().applications:
        ray_serve.delete(NAME, _blocking=False)
    while NAME in ray_serve.status().applications:
        time.sleep(_LOOK_S / 5)
    ray.kill(_latest_run())
    if not ray_serve.status().applications:
        ray_serve.shutdown()
    ray.shutdown()
