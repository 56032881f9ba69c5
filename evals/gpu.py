"""The GPU acceptance command: everything that only a GPU can show, in one record and one page.

`python3 -m qmix.evals.gpu --out DIR [--budget SECONDS] [--only STEP]` runs from a bare checkout.
The most valuable step comes first. One worker runs them all, and is started again only after a
step that ended it or took too long. A line goes to DIR/results.jsonl for each result, so that a
fault loses nothing that was measured before it; `--continue DIR` goes on with what such a journal
leaves. `--rehearse` runs every step on the CPU, at tiny widths: its figures mean nothing.

Knows the steps by name; what they measure is in qmix.evals.steps.
"""

import argparse
import datetime
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from qmix.evals.acceptance.clocks import ClockLog
from qmix.evals.acceptance.journal import Journal
from qmix.evals.acceptance.process import WorkerProcess, python
from qmix.evals.acceptance.record import AcceptanceRecord, StepOutcome
from qmix.evals.acceptance.step import STEPS, Step
from qmix.evals.acceptance.supervisor import Supervisor, Worker
from qmix.evals.command import say

ROOT = Path(__file__).resolve().parent.parent
BUDGET_SECONDS = 540.0
_REHEARSED = 10  # times as long a step may take in a rehearsal


def run_steps(
    steps: Sequence[Step], out: Path, budget: float, command: str, start: Callable[[], Worker]
) -> AcceptanceRecord:
    """Run what a folder's journal leaves of the steps, and write the record after each.

    Args:
        budget: in seconds.
        command: as the record states it.
        start: starts a worker.
    """
    journal = Journal(out)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    driver, revision = _driver(), _first_line("git", "-C", str(ROOT), "rev-parse", "HEAD")

    def record() -> AcceptanceRecord:
        machine = journal.machine
        return AcceptanceRecord(
            command=command,
            date=date,
            gpu=machine.get("gpu"),
            driver=driver,
            versions=machine.get("versions", {}),
            revision=revision,
            budget=budget,
            machine=machine,
            steps=dict(journal.outcomes),
        )

    clocks = ClockLog()

    def on_end(step: Step) -> None:
        taken = clocks.taken()
        if taken:
            journal.add({"step": step.name, "clocks": taken})
        record().write(out)
        outcome = journal.outcomes[step.name]
        say(f"{step.name}: {outcome.status}, {outcome.seconds:.1f} s")

    def on_begin(step: Step, limit: float) -> None:
        clocks.taken()
        say(f"{step.name}: at most {limit:.0f} s")

    supervisor = Supervisor(start, journal, budget, on_begin=on_begin, on_end=on_end)
    try:
        left_out = supervisor.run(_unfinished(steps, journal))
    finally:
        clocks.close()
    whole = record()
    for step in left_out:
        whole.steps.setdefault(
            step.name, StepOutcome("skipped", error="no time left, or no worker")
        )
    whole.write(out)
    return whole


def _unfinished(steps: Sequence[Step], journal: Journal) -> list[Step]:
    """The steps that have no result yet; those that were tried before come last."""
    done = {name for name, found in journal.outcomes.items() if found.status in ("ok", "skipped")}
    left = [step for step in steps if step.name not in done]
    return sorted(left, key=lambda step: step.name in journal.outcomes)


def _driver() -> str | None:
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _first_line(*command: str) -> str | None:
    """The first line that a program prints; None if there is no such program, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _starter(options: argparse.Namespace) -> Callable[[], Worker]:
    """What starts a worker: on the GPU or, in a rehearsal, on the CPU."""
    arguments, environment = [], {}
    if options.rehearse:
        arguments, environment = ["--rehearse"], {"TRITON_INTERPRET": "1"}
        if options.fail:
            arguments += ["--fail", options.fail]
    command = python("qmix.evals.acceptance.worker", *arguments)
    return lambda: WorkerProcess(command, cwd=ROOT, environment=environment)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m qmix.evals.gpu", description=__doc__)
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--out", type=Path, metavar="DIR", help="folder of the record")
    folder.add_argument(
        "--continue", type=Path, metavar="DIR", dest="resumed", help="go on with a folder's journal"
    )
    parser.add_argument(
        "--budget", type=_seconds, default=BUDGET_SECONDS, help="seconds in total (540)"
    )
    parser.add_argument(
        "--only",
        choices=[step.name for step in STEPS],
        metavar="STEP",
        action="append",
        help="run this step only; may be repeated: " + ", ".join(step.name for step in STEPS),
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny widths")
    parser.add_argument("--fail", metavar="STEP=HOW", help=argparse.SUPPRESS)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, found {text}")
    return seconds


def _check_folder(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """A new record goes into a folder without a journal; one that is continued has one."""
    if options.resumed is not None:
        if not Journal.is_in(options.resumed):
            parser.error(f"{options.resumed} holds no journal to continue")
        return
    out: Path = options.out
    if Journal.is_in(out):
        parser.error(f"{out} holds a journal already: --continue {out}, or another folder")
    if out.exists() and not out.is_dir():
        parser.error(f"{out} is no folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module's docstring.

    Returns:
        0: something was measured, and no step failed or took too long.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(given)
    _check_folder(options, parser)
    out = options.out or options.resumed
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    if options.rehearse:  # the interpreter's pace says nothing
        steps = [replace(step, seconds=_REHEARSED * step.seconds) for step in steps]
    command = shlex.join(("python3", "-m", "qmix.evals.gpu", *given))
    record = run_steps(steps, out, options.budget, command, _starter(options))
    sys.stdout.write(record.markdown())
    statuses = {outcome.status for outcome in record.steps.values()}
    return 0 if "ok" in statuses and not statuses & {"failed", "timeout"} else 1


if __name__ == "__main__":
    sys.exit(main())
