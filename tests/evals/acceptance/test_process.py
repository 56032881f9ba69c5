"""The worker as a real process that hangs, dies and prints, without torch."""

import os
import select
import signal
import subprocess
import sys

import pytest

from qmix.evals.acceptance.process import WorkerProcess
from qmix.evals.acceptance.supervisor import WorkerGoneError
from tests.support.process import PATIENCE, started

CODE = """
import json, os, subprocess, sys
from qmix.evals.acceptance.process import end_with_parent
end_with_parent()
pipe = os.fdopen(int(sys.argv[1]), "w")
print("hello from", os.getpid(), flush=True)
def say(**message):
    print(json.dumps(message), file=pipe, flush=True)
say(machine={"gpu": None})
for line in sys.stdin:
    what = line.strip()
    say(result={"step": what})
    if what == "die":
        os.abort()
    if what == "leave":
        sys.exit(3)
    if what.startswith("hang"):
        subprocess.run(["sh", "-c", "echo x; exec sleep 600"], stdout=open(what.split()[1], "w"))
    say(end="ok", error=None, fatal=False)
"""


@pytest.fixture
def worker(tmp_path):
    worker = WorkerProcess([sys.executable, "-c", CODE], cwd=tmp_path)
    assert worker.receive(PATIENCE) == {"machine": {"gpu": None}}
    yield worker
    worker.end()


# The command that starts a worker has it hang, and waits.
COMMAND = """
import sys
from pathlib import Path
from qmix.evals.acceptance.process import WorkerProcess
worker = WorkerProcess([sys.executable, "-c", sys.argv[1]], cwd=Path())
worker.request(sys.argv[2])
input()
"""


@pytest.fixture
def alive(tmp_path):
    """A pipe that a process which hangs writes to once, and the request that starts it."""
    path = tmp_path / "alive"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield pipe, f"hang {path}"
    os.close(pipe)


def next_bytes(pipe):
    """What is written next; empty when nobody is left who could write."""
    assert select.select([pipe], [], [], PATIENCE)[0]
    return os.read(pipe, 100)


def test_it_runs_one_step_after_another(worker):
    for name in ("a", "b"):
        worker.request(name)
        assert worker.receive(PATIENCE) == {"result": {"step": name}}
        assert worker.receive(PATIENCE)["end"] == "ok"
    assert worker.receive(0) is None
    assert worker.end().startswith("hello from")


@pytest.mark.parametrize(("how", "said"), [("die", "signal 6"), ("leave", "exit code 3")])
def test_its_death_is_told_after_its_results(worker, how, said):
    worker.request(how)
    assert worker.receive(PATIENCE) == {"result": {"step": how}}
    with pytest.raises(WorkerGoneError, match=f"(?s)hello from.*{said}"):
        worker.receive(PATIENCE)
    assert worker.end() == ""


def test_it_is_ended_with_what_it_started(worker, alive):
    pipe, hang = alive
    worker.request(hang)
    assert next_bytes(pipe) == b"x\n"
    worker.end()
    assert next_bytes(pipe) == b""


def test_it_does_not_outlive_a_command_that_is_killed(alive):
    """It would share the device with the command that goes on with the journal."""
    pipe, hang = alive
    code = [sys.executable, "-c", COMMAND, CODE, hang]
    with started(code, stdin=subprocess.PIPE) as command:
        assert next_bytes(pipe) == b"x\n"
        command.send_signal(signal.SIGKILL)
    assert next_bytes(pipe) == b""
