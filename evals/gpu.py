"""The GPU acceptance command: everything that only a GPU can show, in one record and one page.

`python3 -m qmix.evals.gpu --out DIR --budget SECONDS [--only NAME] [--profile]` runs from a bare
checkout. The most valuable step comes first. Each step has its fraction of the time, and what one
leaves the next may use. A step runs in a process of its own and writes a line for each result, so
that a fault or a hang loses nothing that was measured before it. Without a GPU the steps that need
one are skipped, and the record says so.

Knows the steps by name; what they measure is in qmix.evals.steps.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qmix.evals.command import say
from qmix.evals.steps.record import AcceptanceRecord, StepOutcome

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """A step of the command.

    Attributes:
        module: its module in qmix.evals.steps.
        fraction: of the budget.
    """

    name: str
    module: str
    fraction: float
    needs_gpu: bool = True


STEPS = (
    Step("tests", "gpu_tests", 0.25),
    Step("bandwidth", "bounds", 0.05, needs_gpu=False),
    Step("moe", "moe_block", 0.2),
    Step("model", "full_model", 0.45),
    Step("peers", "peers", 0.3),
    Step("attention", "attention", 0.15),
)
PROFILE = Step("profile", "token_profile", 0.2)
_START_SECONDS = 30.0  # to import torch and start CUDA, with a margin for a busy machine
_LEAST_SECONDS = 5.0  # with less left, no process is started


def run_steps(
    steps: Sequence[Step], out: Path, budget: float, command: str, *, gpu: bool | None = None
) -> AcceptanceRecord:
    """Run steps one after another within `budget` seconds, and write the record after each.

    Args:
        out: folder of the record.
        command: as the record states it.
        gpu: whether there is one; by default what torch says.
    """
    out.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available() if gpu is None else gpu
    record = _new_record(command, budget, has_gpu)
    begun = time.monotonic()
    for index, step in enumerate(steps):
        left = budget - (time.monotonic() - begun)
        if step.needs_gpu and not has_gpu:
            outcome = StepOutcome("skipped", error="no CUDA device")
        elif left < _LEAST_SECONDS:
            outcome = StepOutcome("skipped", error="no time left")
        else:
            fraction = step.fraction if len(steps) > 1 else 1.0
            remaining = sum(other.fraction for other in steps[index:])
            limit = min(left, max(_START_SECONDS, left * fraction / remaining * 1.5))
            say(f"{step.name}: at most {limit:.0f} s")
            outcome = _run_apart(step, limit)
        record.steps[step.name] = outcome
        record.write(out)
        say(f"{step.name}: {outcome.status}, {outcome.seconds:.1f} s")
    return record


def _run_apart(step: Step, limit: float) -> StepOutcome:
    """Run a step in a process group of its own, for at most `limit` seconds."""
    with tempfile.TemporaryDirectory() as scratch:
        lines, messages = Path(scratch) / "results", Path(scratch) / "messages"
        begun = time.monotonic()
        with messages.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "qmix.evals.gpu", "--step", step.module, str(lines)],
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
        results = _read_results(lines)
        output = messages.read_text(encoding="utf-8", errors="replace")[-6000:]
    if code is None:
        return StepOutcome("timeout", seconds, results, f"{output}\nended after {limit:.0f} s")
    if code:
        return StepOutcome("failed", seconds, results, output or f"exit code {code}")
    skipped = [result["skipped"] for result in results if "skipped" in result]
    if skipped and len(skipped) == len(results):
        return StepOutcome("skipped", seconds, results, str(skipped[0]))
    failed = [result["failed"] for result in results if "failed" in result]
    if failed:
        error = f"{len(failed)} of {len(results)}: {failed[0]}"
        return StepOutcome("failed", seconds, results, error)
    return StepOutcome("ok", seconds, results)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the step and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_results(lines: Path) -> list[dict[str, Any]]:
    """The results, one in each line; the last line may be cut short."""
    results = []
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return results


def write_results(module: str, lines: Path) -> int:
    """Run a step in this process and write each result as soon as there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step_results = import_module(f"qmix.evals.steps.{module}").results
    with lines.open("w", encoding="utf-8") as sink, torch.no_grad():
        results: Iterator[dict[str, object]] = step_results(device)
        try:
            for result in results:
                sink.write(json.dumps(result) + "\n")
                sink.flush()
        except Exception:  # noqa: BLE001 - whatever it is, the record must state it
            traceback.print_exc()
            return 1
    return 0


def _new_record(command: str, budget: float, has_gpu: bool) -> AcceptanceRecord:
    return AcceptanceRecord(
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        gpu=torch.cuda.get_device_name() if has_gpu and torch.cuda.is_available() else None,
        driver=_first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        revision=_first_line("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        budget=budget,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """The first line that a program prints; None if there is no such program, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python3 -m qmix.evals.gpu", description=__doc__)
    names = [step.name for step in (*STEPS, PROFILE)]
    parser.add_argument("--out", type=Path, help="folder of the record")
    parser.add_argument("--budget", type=float, default=540, help="seconds in total (540)")
    parser.add_argument(
        "--only", choices=names, action="append", help="run this step only; may be repeated"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also time one token, kernel by kernel"
    )
    parser.add_argument("--step", nargs=2, metavar=("MODULE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.step:
        return write_results(options.step[0], Path(options.step[1]))
    if options.out is None:
        parser.error("--out is required")
    steps = [*STEPS, *((PROFILE,) if options.profile else ())]
    if options.only:
        steps = [step for step in (*STEPS, PROFILE) if step.name in options.only]
    command = " ".join(("python3 -m qmix.evals.gpu", *given))
    record = run_steps(steps, options.out, options.budget, command)
    sys.stdout.write(record.markdown())
    statuses = {outcome.status for outcome in record.steps.values()}
    return 1 if statuses & {"failed", "timeout"} else 0


if __name__ == "__main__":
    sys.exit(main())
