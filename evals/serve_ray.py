"""`qmix serve --ray` where things go wrong: does every caller get its answer, or an error?

`python -m qmix.evals.serve_ray [MODEL] [--callers 20] [--requests 10] [--json FILE]` starts a Ray
cluster on this machine and two replicas. Callers ask, every other one for a stream, while three
replicas are killed by SIGKILL, one after the other; then while both are replaced by those of a copy
of the model; then while the server gets SIGTERM. An answer must be, to the letter, that of a run of
the model alone; in float32 no rounding of a batch reaches a choice. What is lost must be an error
to its caller: a status, an event, or a connection that is cut off. The exit code is 5 if an answer
is wrong, ends as if it were whole, or does not come, or if a request fails in the rolling update.
"""

import argparse
import asyncio
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from qmix.errors import QualityError
from qmix.evals.command import command_line, exit_code, publish, say
from qmix.evals.serving.http_call import Address, HttpCall, SilentEndError
from qmix.evals.serving.ports import free_port
from qmix.evals.serving.questions import COMPLETIONS, Reply, right_replies
from qmix.evals.serving.ray_processes import RayProcesses, ray_processes, until
from qmix.evals.training import tiny_model
from qmix.models.auto import load
from qmix.planning import machine

_REPLICAS, _KILLS = 2, 3
_PATIENCE_S = 300.0  # for one answer; beyond it the server counts as hanging
_PACKAGES = ("ray", "torch", "starlette", "uvicorn")
_OPTIONS = "--device cpu --dtype fp32 --slots 4 --queue 256 --ctx 512 --name served"
# Ends of a request. The last three are none that a caller should see.
_RIGHT, _SILENT, _WRONG, _HANGING = "right", "silent", "wrong", "hanging"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What came of a number of requests.

    Attributes:
        asked: how many there were, and how many of them streamed.
        ends: how many ended how.
        details: one line of some that were not right.
    """

    asked: int
    streamed: int
    ends: Mapping[str, int]
    details: tuple[str, ...]

    @property
    def faults(self) -> int:
        """Requests whose caller was not told the truth."""
        return sum(self.ends.get(name, 0) for name in (_SILENT, _WRONG, _HANGING))

    @property
    def errors(self) -> int:
        """Requests that did not get a right answer."""
        return self.asked - self.ends.get(_RIGHT, 0)

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.ends.items()))
        return f"{self.asked} requests, {self.streamed} of them streams: {ends}"


@dataclass(frozen=True, kw_only=True)
class RayRecord:
    """One run.

    Attributes:
        killed: while replicas were killed, one after the other, until there were two again,
            `restored_s` after the last; `afterwards` what came of requests then.
        updated: while the replicas were replaced; `first_exit_code` is of the server of before.
        ended: while the server got SIGTERM; requests that came after it count as errors.
        exit_code, stop_s: of the server, after SIGTERM.
    """

    command: str
    date: str
    cpu: str
    versions: Mapping[str, str]
    killed: Phase
    restored_s: float
    afterwards: Phase
    updated: Phase
    first_exit_code: int
    ended: Phase
    exit_code: int
    stop_s: float

    @property
    def problems(self) -> tuple[str, ...]:
        """What should not have happened."""
        phases = {"a kill": self.killed, "an update": self.updated, "SIGTERM": self.ended}
        found = [f"{name}: {phase}" for name, phase in phases.items() if phase.faults]
        for name, phase in (("the update", self.updated), ("after the kill", self.afterwards)):
            if phase.errors:
                found.append(f"{phase.errors} errors in {name}: {phase.details[:3]}")
        codes = (self.first_exit_code, self.exit_code)
        return (*found, *([f"exit codes {codes}"] if any(codes) else ()))

    def __str__(self) -> str:
        return (
            f"{_KILLS} replicas killed: {self.killed}; two again after {self.restored_s:.0f} s\n"
            f"after it: {self.afterwards}\n"
            f"a rolling update: {self.updated}\n"
            f"SIGTERM: {self.ended}; exit code {self.exit_code} after {self.stop_s:.0f} s\n"
        )


def measure_ray(model: Path, *, callers: int, requests: int) -> RayRecord:
    """Run all of it.

    Raises:
        QmixError: no such model, or something does not start or end.
    """
    say("what the model says alone")
    replies = right_replies(*load(model, device="cpu", dtype="fp32"), 0)
    address = Address(free_port())
    options = [*_OPTIONS.split(), "--replicas", str(_REPLICAS)]

    def asked(disturbance: Callable[[], object], requests: int = requests) -> Phase:
        return asyncio.run(_load(address, replies, callers, requests, disturbance))

    with ExitStack() as stack:
        copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "copy"
        shutil.copytree(model, copy)
        cluster = stack.enter_context(ray_processes(2 * _REPLICAS))
        say("a server of two replicas")
        first = stack.enter_context(cluster.serving(address, str(model), *options))
        say("replicas are killed")
        restored: list[float] = []
        killed = asked(lambda: restored.append(_kill(cluster)))
        say("after it")
        afterwards = asked(lambda: None)
        say("a rolling update")
        update = cluster.serving(address, str(copy), *options)
        servers = [first]
        updated = asked(lambda: servers.append(stack.enter_context(update)))
        first_exit_code = first.wait(_PATIENCE_S)
        say("SIGTERM")
        second = servers[-1]
        begun = time.monotonic()
        ended = asked(second.terminate, 1)
        code = second.wait(_PATIENCE_S)
        stop_s = time.monotonic() - begun
    return RayRecord(
        command=command_line("serve_ray"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=machine.processor(),
        versions={name: version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        killed=killed,
        restored_s=restored[0],
        afterwards=afterwards,
        updated=updated,
        first_exit_code=first_exit_code,
        ended=ended,
        exit_code=code,
        stop_s=stop_s,
    )


def _kill(cluster: RayProcesses) -> float:
    """Kill replicas, one after the other. Returns the seconds until there are as many again.

    Raises:
        ResourceError: there are not.
    """
    seconds = 0.0
    for _ in range(_KILLS):
        number = cluster.kill_replica()
        seconds = until(partial(_is_whole, cluster, number), "another replica")
    return seconds


def _is_whole(cluster: RayProcesses, killed: int) -> bool:
    return len({*cluster.replicas()} - {killed}) == _REPLICAS


async def _load(
    address: Address,
    replies: Sequence[Reply],
    callers: int,
    requests: int,
    disturbance: Callable[[], object],
) -> Phase:
    """Ask; once a third of the answers are there, disturb, and ask on until that is done.

    Args:
        callers: at the same time; each asks so many `requests` at least.
        disturbance: runs beside them, in a thread.
    """
    ends: list[tuple[str, str]] = []
    streamed = 0
    third, is_over = asyncio.Event(), asyncio.Event()

    async def caller(number: int) -> None:
        nonlocal streamed
        at = 0
        while at < requests or not is_over.is_set():
            streams = (number + at) % 2 == 0
            streamed += streams
            reply = replies[(number * 7 + at) % len(replies)]
            ends.append(await _end(address, reply, streams=streams))
            at += 1
            if 3 * len(ends) >= callers * requests:
                third.set()

    async def disturber() -> None:
        await third.wait()
        await asyncio.to_thread(disturbance)
        is_over.set()

    await asyncio.gather(disturber(), *(caller(number) for number in range(callers)))
    details = sorted({f"{name}: {text}" for name, text in ends if text})
    return Phase(
        asked=len(ends),
        streamed=streamed,
        ends=dict(Counter(name for name, _ in ends)),
        details=tuple(details[:10]),
    )


async def _end(address: Address, reply: Reply, *, streams: bool) -> tuple[str, str]:
    """How a request ends, and what is said of it if it was not right."""
    body = {"prompt": list(reply.ids), "max_tokens": reply.new, "temperature": 0}
    call = HttpCall(address, COMPLETIONS, {**body, "stream": streams})
    try:
        async with asyncio.timeout(_PATIENCE_S), call:
            if call.status != 200:
                return f"status {call.status}", ""
            if not streams:
                text = (await call.document())["choices"][0]["text"]
            else:
                text = ""
                async for event in call.events():
                    if "error" in event:
                        return "error event", str(event["error"])[:200]
                    text += event["choices"][0]["text"]
    except TimeoutError:
        return _HANGING, f"no end after {_PATIENCE_S:.0f} s"
    except SilentEndError as error:
        return _SILENT, str(error)
    except (OSError, EOFError) as error:
        return "cut off" if call.status else "no connection", f"{type(error).__name__}: {error}"
    except ValueError as error:
        # A whole answer has a length; without all of it, the connection was lost.
        return "cut off", f"{type(error).__name__}: {error}"[:200]
    if text != reply.text:
        return _WRONG, f"expected {reply.text!r}; found {text!r}"
    return _RIGHT, ""


def _print(model: Path | None, options: argparse.Namespace) -> None:
    record = measure_ray(
        model or tiny_model.directory(), callers=options.callers, requests=options.requests
    )
    publish(record, options.json)
    if record.problems:
        raise QualityError(
            "a caller was not told the truth, or an update failed requests",
            found="; ".join(record.problems),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.serve_ray", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint (the tiny model)")
    parser.add_argument("--callers", type=int, default=20, help="at a time (20)")
    parser.add_argument("--requests", type=int, default=10, help="of each, at least (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    options = parser.parse_args(arguments)
    return exit_code("serve_ray", lambda: _print(options.model, options))


if __name__ == "__main__":
    sys.exit(main())
