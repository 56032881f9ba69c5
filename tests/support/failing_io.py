"""Calls that a command makes on its files fail, or are its last: run under fail_io.c.

    LD_PRELOAD=fail_io.so python -m tests.support.failing_io ROOT COMMAND ERRNO POINTS SEED KIND...

Of the calls of each kind POINTS are tried, drawn from SEED. A negative ERRNO is a signal. For each
kind one JSON line is printed: how many calls there were and were tried, how many of these ended in
an error, and what went wrong. A process is forked for each call: the imports are paid for once.
"""

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from qmix.errors import QmixError
from qmix.formats.files import manifest
from tests.support import writing_commands
from tests.support.writing_commands import COMMANDS, OURS, REPLACING

LOST = 99  # exit code of a foreign exception
INTERRUPTED = 130
_MANAGED = re.compile(r"(out|out\.partial|\.qmix-replaced-[0-9a-f]{16})(/.*)?")
_UNFINISHED = (manifest.MARKER, manifest.STATE)


@dataclass(frozen=True)
class Attempt:
    """How a process ended: its exit code (negative: the signal), the error, the calls it made."""

    code: int
    said: str = ""
    calls: int = 0

    @property
    def stands(self):
        return "stands" in self.said


@dataclass(frozen=True)
class Sweep:
    """One command under one fault, in a folder of its own."""

    root: Path
    command: str
    kind: str
    number: int

    @property
    def work(self):
        return self.root / "work"

    def renew(self):
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.root / "original", self.work)

    def attempt(self, at=0):
        """Run the command in a process whose call of that number fails; none does for 0."""
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reader)
            self._work(writer, at)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            written = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return Attempt(code, **json.loads(written or "{}"))

    def _work(self, writer, at):
        shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
        code, said = 0, ""
        torch.set_num_threads(
            1
        )  # torch makes its pool anew after a fork: not by two threads at once
        shim.fail_io_set(self.kind.encode(), at, self.number, str(self.work).encode())
        try:
            COMMANDS[self.command](self.work / "source", self.work / "out")
        except QmixError as error:
            code, said = error.exit_code, str(error)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BaseException:  # noqa: BLE001 - the oracle: nothing else may come out
            code, said = LOST, traceback.format_exc()[-4000:]
        os.write(writer, json.dumps({"said": said, "calls": shim.fail_io_count()}).encode())
        os._exit(code)

    def run(self, points, seed):
        """Try so many of the calls; returns what is printed."""
        self.renew()
        before = digests(self.work)
        whole = self.attempt()
        assert whole.code == 0, whole.said
        oracle = Oracle(self.work, self.command, before, digests(self.work))
        drawn = random.Random(seed).sample(range(1, whole.calls + 1), min(points, whole.calls))
        ended, problems = 0, []
        for at in sorted(drawn):
            self.renew()
            attempt = self.attempt(at)
            ended += attempt.code != 0
            problem = oracle.wrong(attempt) or oracle.wrong_again(attempt, self.attempt())
            if problem is not None:
                problems.append(f"{self.kind} {at} of {whole.calls}: {problem}")
        return {"kind": self.kind, "calls": whole.calls, "tried": len(drawn), "ended": ended,
                "problems": problems}  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """What must hold after a fault: digests of the folder before and after a whole run."""

    work: Path
    command: str
    before: dict
    after: dict

    def wrong(self, attempt):
        """What an attempt did that it must not do, or None."""
        code, said, found = attempt.code, attempt.said, digests(self.work)
        if code not in (0, 3, 4, INTERRUPTED, -signal.SIGKILL):
            return f"exit code {code}: {said}"
        if code in (3, 4) and (str(self.work) not in said or "found" not in said):
            return f"the error names no file or no reason: {said}"
        if foreign(found) != foreign(self.before):
            return f"a foreign file was touched: {difference(found, self.before)}"
        now, old, new = (output(each) for each in (found, self.before, self.after))
        if now not in (old, new) and not self._has_no_config(now):
            if self.command in REPLACING and not now and self._is_aside(found, old):
                return None
            return f"half an output: {difference(now, new)}"
        if code in (3, 4) and now == new != old and not attempt.stands:
            return f"OUT is there, and the error does not say so: {said}"
        return None

    def _has_no_config(self, now):
        """Whether it is a folder that held other files, and the save did not come to its end."""
        return self.command == "save" and "out/config.json" not in now

    def _is_aside(self, found, old):
        (aside,) = {path.split("/")[0] for path in found if path.startswith(".qmix-replaced-")} - {
            ".qmix-replaced-mine"
        }
        moved = {p.removeprefix(f"{aside}/"): d for p, d in found.items() if p.startswith(aside)}
        return output(moved) == old

    def wrong_again(self, first, again):
        """What is wrong after a second run, to which nothing happens; or None."""
        found = digests(self.work)
        if again.code and not (again.code == 2 and output(found) == output(self.after)):
            return f"after {first}: the rerun: exit code {again.code}: {again.said}"
        if found != self.after:
            return f"after {first}: the rerun left {difference(found, self.after)}"
        return None


def digests(folder):
    """Path -> SHA-256 of each file below a folder, but of a report, which has times in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        exact = path.is_file() and path.name != manifest.REPORT
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if exact else path.is_dir()
    return found


def foreign(found):
    """What is the user's own."""
    return {
        path: digest
        for path, digest in found.items()
        if not _MANAGED.fullmatch(path) or path == f"out/{OURS}"
    }


def output(found):
    """What lies at OUT, without the marks of a run that has not tidied up."""
    return {
        path: digest
        for path, digest in found.items()
        if path.split("/")[0] == "out"
        and path.split("/")[-1] not in _UNFINISHED
        and ".qmix-saving" not in path
    }


def difference(found, expected):
    paths = sorted(path for path in found.keys() | expected.keys()
                   if found.get(path, "none") != expected.get(path, "none"))  # fmt: skip
    return ", ".join(f"{path} {_change(path, found, expected)}" for path in paths[:8])


def _change(path, found, expected):
    if path not in expected:
        return "too many"
    return "changed" if path in found else "missing"


def main():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    root, command, number, points, seed, *kinds = sys.argv[1:]
    original = Path(root, "original")
    original.mkdir()
    writing_commands.prepare(original, command)
    for kind in kinds:
        sweep = Sweep(Path(root), command, kind, int(number))
        print(json.dumps(sweep.run(int(points), int(seed))), flush=True)


if __name__ == "__main__":
    main()
