"""The worker as a real process that hangs, dies and prints, without torch."""

import os
import select
import sys

import pytest

from qmix.evals.acceptance.process import WorkerProcess
from qmix.evals.acceptance.supervisor import WorkerGoneError
from tests.support.process import PATIENCE

CODE = """
import json, os, subprocess, sys
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
        child = "import sys; pipe = open(sys.argv[1], 'w'); print('x', file=pipe, flush=True); input()"
        subprocess.run([sys.executable, "-c", child, what.split()[1]], stdin=subprocess.PIPE)
    say(end="ok", error=None, fatal=False)
"""


@pytest.fixture
def worker(tmp_path):
    worker = WorkerProcess([sys.executable, "-c", CODE], cwd=tmp_path)
    assert worker.receive(PATIENCE) == {"machine": {"gpu": None}}
    yield worker
    worker.end()


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


def test_it_is_ended_with_what_it_started(worker, tmp_path):
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    pipe = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    try:
        worker.request(f"hang {alive}")
        worker.receive(PATIENCE)
        assert select.select([pipe], [], [], PATIENCE)[0]
        assert os.read(pipe, 100) == b"x\n"
        worker.end()
        assert select.select([pipe], [], [], PATIENCE)[0]
        assert os.read(pipe, 100) == b""  # nobody is left who could write
    finally:
        os.close(pipe)
