"""Disks that fail: every open, read, write, fsync, rename and close of every command; and SIGKILL.

Most of it is left to `make soak`, in pieces small enough that one of few minutes begins some.
"""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from qmix.errors import ResourceError
from qmix.kernels.cpu import build
from tests.support.models import ROOT
from tests.support.soak import SEED, gate_and_soak
from tests.support.writing_commands import COMMANDS, READERS, WRITERS

ERRNOS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EACCES", "EINTR")
READING = ("open", "read", "pread", "short read", "close")
WRITING = (*READING, "write", "short", "fsync", "rename", "unlink", "rmdir", "mkdir")
POINTS = {False: 1, True: 3}  # of each kind of call, tried in one test
KILLS = {False: 2, True: 10}  # in one test
FAILING = [(command, name) for name in ERRNOS for command in COMMANDS]
SIGNALS = ("SIGKILL", "SIGINT", "SIGKILL")
KILLED = [(command, name, part) for part, name in enumerate(SIGNALS) for command in WRITERS]


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    try:
        compiler = build._compiler()
    except ResourceError:
        pytest.skip("no compiler for the library that makes calls fail")
    library = tmp_path_factory.mktemp("shim") / "fail_io.so"
    source = ROOT / "tests" / "support" / "fail_io.c"
    command = [*compiler, "-x", "c", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the library that makes calls fail cannot be compiled: {done.stderr[:200]}")
    return library


def swept(shim, root, command, number, points, counted, kinds, seed=SEED):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.failing_io", root, command),
            *(str(number), str(points), str(seed), *kinds),
        ],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    problems = [problem for each in found for problem in each["problems"]]
    tried, ended = (sum(each[name] for each in found) for name in ("tried", "ended"))
    outcome = "refused" if number > 0 else "killed"
    counted(**{"cases": tried, outcome: ended, "done": tried - ended, "wrong": len(problems)})
    assert problems == []
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name", "soak"), gate_and_soak(FAILING[::90], FAILING))
def test_a_disk_that_fails_at_any_call_is_said_and_the_next_run_is_whole(
    shim, tmp_path, counted, command, name, soak
):
    kinds = READING if command in READERS else WRITING
    number = getattr(errno, name)
    found = swept(shim, tmp_path, command, number, POINTS[soak], counted, kinds)
    assert all(each["tried"] for each in found if each["kind"] in ("open", "read", "close"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "name", "part", "soak"), gate_and_soak(KILLED[: len(WRITERS) : 4], KILLED)
)
def test_a_run_killed_at_any_call_is_made_whole_by_the_next(
    shim, tmp_path, counted, command, name, part, soak
):
    """The folder is the same to the last byte as after a run that nobody killed."""
    number, seed = -getattr(signal, name), 1000 * SEED + part
    (found,) = swept(shim, tmp_path, command, number, KILLS[soak], counted, ["change"], seed)
    assert found["tried"] == KILLS[soak]
    assert found["ended"] or name == "SIGINT"
