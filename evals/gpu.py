"""The GPU acceptance command: everything that only a GPU can show, in one record and one table.

`python3 -m qmix.evals.gpu --out DIR --budget SECONDS [--only NAME] [--profile]`, from a bare checkout.
The most valuable step comes first; each has its share of the time, what one leaves the next may use. A
step runs in a process of its own and writes a line a result, so that a fault or a hang takes nothing
with it that was measured. Without a GPU the steps that need one are skipped, and the record says so.

Knows the steps by name; what they measure is theirs (qmix.evals.steps).
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parent.parent

Status = Literal["ok", "failed", "timeout", "skipped"]


@dataclass(frozen=True)
class Plan:
    """A step: its module in qmix.evals.steps, its share of the budget, whether it needs a GPU."""

    name: str
    module: str
    share: float
    needs_gpu: bool = True


STEPS = (
    Plan("tests", "gpu_tests", 0.25),
    Plan("bandwidth", "bounds", 0.05, needs_gpu=False),
    Plan("moe", "moe_block", 0.2),
    Plan("model", "full_model", 0.45),
    Plan("peers", "peers", 0.3),
    Plan("attention", "attention", 0.15),
)
PROFILE = Plan("profile", "token_profile", 0.2)
_START_SECONDS = 30.0  # importing torch and starting CUDA, with room for a busy machine
_LEAST_SECONDS = 5.0  # less is not worth starting a process


@dataclass
class Outcome:
    """What became of a step: its results as far as it came, and why it came no further."""

    status: Status
    seconds: float = 0.0
    results: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None


@dataclass
class Record:
    """The document that is written, after every step anew."""

    command: str
    date: str
    gpu: str | None
    driver: str | None
    versions: dict[str, str | None]
    revision: str | None
    budget: float
    steps: dict[str, Outcome] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """DATE-GPU-acceptance.json and .md, each replaced as a whole; the path of the first."""
        gpu = re.sub(r"[^a-z0-9]+", "-", (self.gpu or "no-gpu").lower()).strip("-")
        path = folder / f"{self.date[:10]}-{gpu}-acceptance.json"
        for target, text in (
            (path, json.dumps(asdict(self), indent=1) + "\n"),
            (path.with_suffix(".md"), self.markdown()),
        ):
            partial = target.with_name(target.name + ".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(target)
        return path

    def markdown(self) -> str:
        """What was measured, a table a step."""
        versions = ", ".join(f"{name} {value}" for name, value in self.versions.items() if value)
        lines = [
            f"# {self.gpu or 'No GPU'}, {self.date[:10]}",
            "",
            f"`{self.command}`; revision {self.revision or 'unknown'}; driver {self.driver or '-'}; "
            f"{versions}",
        ]
        for name, outcome in self.steps.items():
            lines += ["", f"## {name}: {outcome.status}, {outcome.seconds:.0f} s", ""]
            lines += _table(outcome.results)
            if outcome.error:
                last = outcome.error.strip().splitlines()[-1]
                lines += ["", f"{outcome.status}: {last}"]
        return "\n".join(lines) + "\n"


def run(
    plans: Sequence[Plan], out: Path, budget: float, command: str, *, gpu: bool | None = None
) -> Record:
    """Run the steps one after another within `budget` seconds and write the record after each.

    Args:
        gpu: whether there is one; by default what torch says.
    """
    out.mkdir(parents=True, exist_ok=True)
    there = torch.cuda.is_available() if gpu is None else gpu
    record = _described(command, budget, there)
    begun = time.monotonic()
    for plan in plans:
        left = budget - (time.monotonic() - begun)
        if plan.needs_gpu and not there:
            outcome = Outcome("skipped", error="no CUDA device")
        elif left < _LEAST_SECONDS:
            outcome = Outcome("skipped", error="no time left")
        else:
            share = plan.share if len(plans) > 1 else 1.0
            later = sum(other.share for other in plans[plans.index(plan) :])
            limit = min(left, max(_START_SECONDS, left * share / later * 1.5))
            sys.stderr.write(f"{plan.name}: at most {limit:.0f} s\n")
            outcome = _apart(plan, limit)
        record.steps[plan.name] = outcome
        record.write(out)
        sys.stderr.write(f"{plan.name}: {outcome.status}, {outcome.seconds:.1f} s\n")
    return record


def _apart(plan: Plan, limit: float) -> Outcome:
    """Run a step in a process group of its own, for at most `limit` seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        lines, messages = Path(scratch) / "results", Path(scratch) / "messages"
        begun = time.monotonic()
        with messages.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "qmix.evals.gpu", "--step", plan.module, str(lines)],
                cwd=ROOT,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        seconds = time.monotonic() - begun
        results = _read(lines)
        said = messages.read_text(encoding="utf-8", errors="replace")[-6000:]
    if code is None:
        return Outcome("timeout", seconds, results, f"{said}\nended after {limit:.0f} s")
    if code:
        return Outcome("failed", seconds, results, said or f"exit code {code}")
    skipped = [result["skipped"] for result in results if "skipped" in result]
    if skipped and len(skipped) == len(results):
        return Outcome("skipped", seconds, results, str(skipped[0]))
    broken = [result["failed"] for result in results if "failed" in result]
    if broken:
        return Outcome("failed", seconds, results, f"{len(broken)} of {len(results)}: {broken[0]}")
    return Outcome("ok", seconds, results)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The step and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(lines: Path) -> list[dict[str, Any]]:
    """A result a line; the last may be cut off."""
    found = []
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def step(module: str, lines: Path) -> int:
    """In the step's own process: a line a result, as soon as it is there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run_step = import_module(f"qmix.evals.steps.{module}").run
    with lines.open("w", encoding="utf-8") as sink, torch.no_grad():
        results: Iterator[dict[str, object]] = run_step(device)
        try:
            for result in results:
                sink.write(json.dumps(result) + "\n")
                sink.flush()
        except Exception:  # noqa: BLE001 - whatever it is, the record shall say it
            traceback.print_exc()
            return 1
    return 0


def _described(command: str, budget: float, gpu: bool) -> Record:
    return Record(
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        gpu=torch.cuda.get_device_name() if gpu and torch.cuda.is_available() else None,
        driver=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        revision=_said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        budget=budget,
    )


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """The first line that a program says; None where there is no such program, or no answer."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _table(results: Sequence[dict[str, Any]]) -> list[str]:
    """A markdown table of all short values; text of several lines is left to the record."""
    names: dict[str, None] = {}
    for result in results:
        names.update(
            dict.fromkeys(
                name for name, value in result.items() if isinstance(value, (str, int, float))
                and "\n" not in str(value)
            )
        )  # fmt: skip
    if not names:
        return ["no results"]
    rows = [[_cell(result.get(name)) for name in names] for result in results]
    lines = [list(names), ["---" for _ in names], *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    text = "" if value is None or isinstance(value, (list, dict)) else str(value)
    return "" if "\n" in text else text.replace("|", "/")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python3 -m qmix.evals.gpu", description=__doc__)
    names = [plan.name for plan in (*STEPS, PROFILE)]
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--budget", type=float, default=540, help="seconds in all (540)")
    parser.add_argument("--only", choices=names, action="append", help="this step; may be repeated")
    parser.add_argument("--profile", action="store_true", help="a token's time, kernel by kernel")
    parser.add_argument("--step", nargs=2, metavar=("MODULE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.step:
        return step(options.step[0], Path(options.step[1]))
    if options.out is None:
        parser.error("--out is needed")
    plans = [*STEPS, *((PROFILE,) if options.profile else ())]
    if options.only:
        plans = [plan for plan in (*STEPS, PROFILE) if plan.name in options.only]
    command = " ".join(("python3 -m qmix.evals.gpu", *given))
    record = run(plans, options.out, options.budget, command)
    sys.stdout.write(record.markdown())
    states = {outcome.status for outcome in record.steps.values()}
    return 1 if states & {"failed", "timeout"} else 0


if __name__ == "__main__":
    sys.exit(main())
