"""`qmix serve` under load: are all texts right, is nothing left behind, how long do callers wait?

`python -m qmix.evals.serve_load [MODEL] [--clients 200] [--requests 20] [--slots 8] [--queue 256]
[--seed 0] [--dtype fp32] [--json FILE]` starts the server as a process and asks it as strangers
do: streams and whole replies, callers that leave, that hardly read, malformed bodies and prompts of
1 MB. A greedy reply must be, to the letter, the one of a run of the model alone; in float32 no
rounding of a batch reaches a choice. What the server holds is read before, halfway and after;
before, it has answered some callers, so that what is made once is there. The exit code is 5 if a
text is wrong or something is left behind.
"""

import argparse
import asyncio
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from qmix.errors import QualityError
from qmix.evals import markdown
from qmix.evals.command import command_line, exit_code, publish, say
from qmix.evals.serving.load import Outcome, put_load
from qmix.evals.serving.questions import Reply, right_replies
from qmix.evals.serving.server_process import Held, ServerProcess, qmix_server
from qmix.evals.training import tiny_model
from qmix.models.auto import load
from qmix.planning import machine

_WARM_UP = (32, 5)  # clients and requests that come before
_SETTLE_S = 40.0  # until connections that nobody closed have ended
# Memory that may have come since halfway: the allocator keeps what a moment needed.
_GROWTH_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True)
class LoadRecord:
    """One run.

    Attributes:
        asked: questions by kind.
        refused: answers that said to come again.
        wrong: one line for each wrong answer.
        first_s, between_s: the 50th and the 99th percentile, in seconds.
        held: before, halfway and after.
        exit_code, stop_s: of the server, after SIGTERM.
    """

    command: str
    date: str
    cpu: str
    versions: Mapping[str, str]
    asked: Mapping[str, int]
    refused: int
    wrong: tuple[str, ...]
    elapsed_s: float
    new_tokens: float
    first_s: tuple[float, float]
    between_s: tuple[float, float]
    held: tuple[Held, Held, Held]
    exit_code: int
    stop_s: float

    @property
    def leaks(self) -> tuple[str, ...]:
        """What was left behind."""
        before, halfway, after = self.held
        found = [
            f"{name}: {getattr(before, name)} before, {getattr(after, name)} after"
            for name in ("descriptors", "threads", "running", "waiting")
            if getattr(after, name) > getattr(before, name)
        ]
        if after.resident > halfway.resident + _GROWTH_BYTES:
            found.append(f"memory: {halfway.resident:,} bytes halfway, {after.resident:,} after")
        return tuple(found)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.asked.items()))
        times = markdown.table(
            ("", "p50", "p99"),
            [
                (name, *(f"{1e3 * value:.0f} ms" for value in values))
                for name, values in (
                    ("to the first token", self.first_s),
                    ("between tokens", self.between_s),
                )
            ],
        )
        held = markdown.table(
            ("", "memory", "descriptors", "threads", "running", "waiting"),
            [
                (name, f"{at.resident / 2**20:.0f} MiB", *map(str, list(asdict(at).values())[1:]))
                for name, at in zip(("before", "halfway", "after"), self.held, strict=True)
            ],
        )
        return (
            f"{sum(self.asked.values())} questions ({kinds}) in {self.elapsed_s:.0f} s, refused "
            f"and asked again {self.refused} times; {self.new_tokens:.0f} new tokens, "
            f"{self.new_tokens / self.elapsed_s:.0f} a second; {len(self.wrong)} wrong answers; "
            f"ended {self.stop_s:.1f} s after SIGTERM with exit code {self.exit_code}\n\n"
            f"{times}\n{held}"
        )


def measure_load(
    model: Path, *, clients: int, requests: int, slots: int, queue: int, seed: int, dtype: str
) -> LoadRecord:
    """Start a server, put a load on it, and end it.

    Raises:
        QmixError: no such model, or the server does not start or end.
    """
    say("what the model says alone")
    replies = right_replies(*load(model, device="cpu", dtype=dtype), seed)
    options = ("--device", "cpu", "--dtype", dtype, "--slots", str(slots), "--queue", str(queue))
    with qmix_server(str(model), *options) as server:
        say("callers that come before")
        _loaded(server, replies, *_WARM_UP, seed + 1)
        before, made_before = _settled(server, None), server.metrics()["qmix_new_tokens_total"]
        begun = time.perf_counter()
        say("the first half")
        first = _loaded(server, replies, clients, requests - requests // 2, seed + 2)
        halfway = server.held()
        say("the second half")
        second = _loaded(server, replies, clients, requests // 2, seed + 3)
        elapsed_s = time.perf_counter() - begun
        after = _settled(server, before)
        new_tokens = server.metrics()["qmix_new_tokens_total"] - made_before
        code, stop_s = server.stop()
    return LoadRecord(
        command=command_line("serve_load"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=machine.processor(),
        versions={"torch": torch.__version__, "python": platform.python_version()},
        asked=dict(first.asked + second.asked),
        refused=first.refused + second.refused,
        wrong=(*first.wrong, *second.wrong),
        elapsed_s=elapsed_s,
        new_tokens=new_tokens,
        first_s=_percentiles(first.first_s + second.first_s),
        between_s=_percentiles(first.between_s + second.between_s),
        held=(before, halfway, after),
        exit_code=code,
        stop_s=stop_s,
    )


def _loaded(
    server: ServerProcess, replies: Sequence[Reply], clients: int, requests: int, seed: int
) -> Outcome:
    return asyncio.run(
        put_load(server.address, replies, clients=clients, requests=requests, seed=seed)
    )


def _settled(server: ServerProcess, before: Held | None) -> Held:
    """What it holds once nothing runs, and no more connections are open than before."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        held = server.held()
        idle = held.running == held.waiting == 0
        if idle and (before is None or held.descriptors <= before.descriptors):
            return held
        if time.monotonic() > deadline:
            return held
        time.sleep(0.2)


def _percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th."""
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49], cuts[98]


def _print(model: Path | None, options: argparse.Namespace) -> None:
    record = measure_load(
        model or tiny_model.directory(),
        clients=options.clients,
        requests=options.requests,
        slots=options.slots,
        queue=options.queue,
        seed=options.seed,
        dtype=options.dtype,
    )
    publish(record, options.json)
    problems = [*record.wrong, *record.leaks]
    if record.exit_code:
        problems.append(f"exit code {record.exit_code}")
    if problems:
        raise QualityError(
            "the server failed under load",
            expected="right texts, and nothing left behind",
            found="; ".join(problems[:5]),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m qmix.evals.serve_load", description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="checkpoint (the tiny model)")
    parser.add_argument("--clients", type=int, default=200, help="callers at a time (200)")
    parser.add_argument("--requests", type=int, default=20, help="questions of each (20)")
    parser.add_argument("--slots", type=int, default=8, help="of the server (8)")
    parser.add_argument("--queue", type=int, default=256, help="of the server (256)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (0)")
    parser.add_argument("--dtype", default="fp32", help="bf16, fp16 or fp32 (fp32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the record to FILE")
    options = parser.parse_args(arguments)
    return exit_code("serve_load", lambda: _print(options.model, options))


if __name__ == "__main__":
    sys.exit(main())
