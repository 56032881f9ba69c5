"""The GPU acceptance command where there is no GPU: skipped visibly, isolated, boxed, recorded."""

import json
import os
import select
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.models import ROOT
from tests.support.process import PATIENCE

pytest.importorskip("triton")

from qmix.evals import gpu
from qmix.evals.gpu import Step
from qmix.evals.steps import gpu_tests, graph_timing, moe_block, peers
from qmix.evals.steps.graph_timing import CallTiming
from qmix.evals.steps.record import AcceptanceRecord, StepOutcome

HAS_GPU = torch.cuda.is_available()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_all_but_the_bandwidth_is_skipped(tmp_path):
    """From a bare copy of the checkout, with nothing installed and no git."""
    bare = tmp_path / "checkout"
    bare.mkdir()
    for name in ("qmix", "quantize", "evals"):
        shutil.copytree(ROOT / name, bare / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml"):
        shutil.copy(ROOT / name, bare / name)
    done = subprocess.run(
        [sys.executable, "-m", "qmix.evals.gpu", "--out", str(tmp_path / "out"), "--budget", "120",
         "--profile"],
        cwd=bare, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    assert path.name.endswith("-no-gpu-acceptance.json")
    record = json.loads(path.read_text())
    states = {name: step["status"] for name, step in record["steps"].items()}
    assert states.pop("bandwidth") == "ok"
    assert states == dict.fromkeys(
        ("tests", "moe", "model", "peers", "attention", "profile"), "skipped"
    )
    assert all(
        step["error"] == "no CUDA device"
        for name, step in record["steps"].items()
        if name != "bandwidth"
    )
    copied = record["steps"]["bandwidth"]["results"][0]
    assert copied["what"] == "copy"
    assert copied["gigabytes_per_second"] > 0.1
    assert record["revision"] is None
    assert record["versions"]["torch"] == torch.__version__
    assert "qmix.evals.gpu --out" in record["command"]
    table = path.with_suffix(".md").read_text()
    assert table == done.stdout
    assert "## moe: skipped" in table
    assert "no CUDA device" in table


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A copy of the sources; the first process of a step compiles their bytes for all."""
    root = tmp_path_factory.mktemp("steps") / "root"
    shutil.copytree(
        ROOT, root,
        ignore=lambda folder, names: [n for n in names if n not in ("qmix", "evals", "pyproject.toml")]
        if folder == str(ROOT) else [n for n in names if n in ("__pycache__", "tiny", "records")],
    )  # fmt: skip
    return root


@pytest.fixture
def steps(root, monkeypatch):
    """Steps of our own: a package qmix.evals.steps that the step's process finds first."""
    monkeypatch.setattr(gpu, "ROOT", root)

    def write(name, body):
        (root / "evals" / "steps" / f"{name}.py").write_text(body)
        return Step(name, name, 1.0, needs_gpu=False)

    return write


def test_a_step_that_fails_keeps_its_results_and_lets_others_run(steps, tmp_path):
    own_steps = [
        steps(
            "broken", "def results(device):\n    yield {'a': 1}\n    raise ValueError('of mine')\n"
        ),
        steps("dying", "import os\ndef results(device):\n    yield {'b': 2}\n    os.abort()\n"),
        steps("fine", "def results(device):\n    yield {'c': str(device.type)}\n"),
    ]
    record = gpu.run_steps(own_steps, tmp_path / "out", 100, "command", gpu=False)
    broken, dying, fine = (record.steps[step.name] for step in own_steps)
    assert (broken.status, broken.results) == ("failed", [{"a": 1}])
    assert "Traceback" in broken.error
    assert "ValueError: of mine" in broken.error
    assert (dying.status, dying.results) == ("failed", [{"b": 2}])
    assert (fine.status, len(fine.results)) == ("ok", 1)
    (path,) = (tmp_path / "out").glob("*.json")
    assert set(json.loads(path.read_text())["steps"]) == {"broken", "dying", "fine"}


def test_a_step_that_hangs_is_ended_with_what_it_started(steps, tmp_path, monkeypatch):
    """Its time runs out once it has yielded a result and its own child has opened a pipe."""
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    body = f"""
import subprocess, sys, time
def results(device):
    yield {{"started": 1}}
    child = "import time; pipe = open({str(alive)!r}, 'w'); print('x', file=pipe, flush=True); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", child])
    time.sleep(600)
"""

    class Popen(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None or "--step" not in self.args:
                return super().wait(timeout)
            assert next_line() == b"x\n"
            raise subprocess.TimeoutExpired(self.args, timeout)

    def next_line():
        assert select.select([pipe], [], [], PATIENCE)[0]
        return os.read(pipe, 100)

    monkeypatch.setattr(gpu.subprocess, "Popen", Popen)
    pipe = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    try:
        record = gpu.run_steps(
            [steps("hanging", body)], tmp_path / "out", 1000, "command", gpu=False
        )
        assert next_line() == b""  # nobody is left who could write
    finally:
        os.close(pipe)
    outcome = record.steps["hanging"]
    assert (outcome.status, outcome.results) == ("timeout", [{"started": 1}])


def test_no_time_left_is_said(steps, tmp_path):
    step = steps("fine", "def results(device):\n    yield {'c': 3}\n")
    record = gpu.run_steps([step], tmp_path / "out", 1, "command", gpu=False)
    assert record.steps["fine"] == StepOutcome("skipped", error="no time left")


def test_the_table():
    record = AcceptanceRecord("command", "2026-01-02T03:04:05+00:00", "NVIDIA H100 80GB HBM3", "1.2", {"torch": "2"},
                    None, 9.0)  # fmt: skip
    record.steps["moe"] = StepOutcome(
        "ok", 3.0, [{"kernel": "a|b", "us": 95.123456, "list": [1]}, {"kernel": "c", "tok": 3}]
    )
    record.steps["peers"] = StepOutcome("failed", 1.0, [], "Traceback\nValueError: odd\n")
    text = record.markdown()
    assert "| kernel | us | tok |" in text
    assert "| a/b | 95.12 |  |" in text
    assert "failed: ValueError: odd" in text


def test_the_record_is_named_by_date_and_gpu(tmp_path):
    record = AcceptanceRecord(
        "c", "2026-01-02T03:04:05+00:00", "NVIDIA H100 80GB HBM3", None, {}, None, 9.0
    )
    assert record.write(tmp_path).name == "2026-01-02-nvidia-h100-80gb-hbm3-acceptance.json"
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md"]


def test_an_unknown_step_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", "x", "--only", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


def test_every_step_can_be_imported():
    from importlib import import_module

    for step in (*gpu.STEPS, gpu.PROFILE):
        assert callable(import_module(f"qmix.evals.steps.{step.module}").results)


def test_the_gpu_tests_are_the_interpreted_ones():
    names = [path.name for path in gpu_tests.kernel_test_files()]
    assert names[0] == "interpreted_decoding.py"
    assert "interpreted_experts.py" in names


def test_the_block_is_asked_layer_by_layer(monkeypatch):
    """Shapes, bytes and rates, with times made up and kernels left out."""
    asked = []
    monkeypatch.setattr(moe_block, "HIDDEN", 128)
    monkeypatch.setattr(moe_block, "WIDTH", 64)
    monkeypatch.setattr(moe_block, "WEIGHTS", 3 * 128 * 64)
    monkeypatch.setattr(moe_block, "TOKENS", (1, 4))
    monkeypatch.setattr(moe_block, "FORMATS", {"nf4": moe_block.FORMATS["nf4"]})
    monkeypatch.setattr(
        moe_block.gpu, "experts", lambda x, chosen, table, layer: asked.append(table)
    )

    def timed(calls, record=True):
        for call in calls:
            call()
        return CallTiming(100.0, 90.0, 1.0, "graph", 20)

    monkeypatch.setattr(moe_block, "timed", timed)
    found = list(moe_block.results(torch.device("cpu")))
    assert [(row["kernel"], row["tokens"]) for row in found] == [("qmix nf4", 1), ("qmix nf4", 4)]
    assert len({id(table) for table in asked}) == moe_block.LAYERS
    first = found[0]
    assert first["distinct_experts"] == 2
    assert first["bits_per_weight"] == pytest.approx(4.25, rel=0.02)
    bytes_read = 2 * 3 * 128 * 64 * first["bits_per_weight"] / 8
    assert first["gigabytes_per_second"] == pytest.approx(bytes_read / 100e-6 / 1e9)


def test_peers_that_are_not_there_say_so(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    def broken(device):
        raise RuntimeError("shape")
        yield

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    monkeypatch.setattr(peers, "int4pack", broken)
    monkeypatch.setattr(peers, "gather", broken)
    found = list(peers.results(torch.device("cpu")))
    assert [("skipped" in row, "failed" in row) for row in found] == [
        (True, False), (True, False), (False, True), (False, True),
    ]  # fmt: skip


def test_pairs_are_sorted_by_expert():
    chosen = moe_block.random_routes(5, torch.device("cpu"))
    token, weights, sizes, experts = peers._sorted_pairs(chosen)
    assert sum(sizes) == 10
    rows = [
        (expert, t.item(), w.item())
        for expert, ts, ws in zip(
            experts.tolist(), token.split(sizes), weights.split(sizes), strict=True
        )
        for t, w in zip(ts, ws, strict=True)
    ]
    meant = [
        (expert, t, chosen.weights[t, k].item())
        for expert in range(8)
        for t in range(5)
        for k in range(2)
        if chosen.ids[t, k] == expert
    ]
    assert rows == meant


def test_test_files_are_counted(tmp_path, monkeypatch):
    path = tmp_path / "interpreted_few.py"
    path.write_text("import pytest\ndef test_one(): pass\ndef test_two(): assert 1 == 2, 'odd'\n")
    monkeypatch.setattr(gpu_tests, "kernel_test_files", lambda: [path])
    monkeypatch.setattr(gpu_tests, "ROOT", tmp_path)
    (found,) = gpu_tests.results(torch.device("cpu"))
    assert (found["passed"], found["failed"]) == (1, 1)
    assert "odd" in found["output"]


class Clock:
    """Stands for CUDA: a call takes 250 us; recording can be refused."""

    def __init__(self, monkeypatch, records):
        self.replays, self.records = 0, records
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                pass

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 0.5  # two calls

        class Graph:
            def replay(self):
                clock.replays += 1

        class Recording:
            def __init__(self, graph):
                pass

            def __enter__(self):
                if not clock.records:
                    raise RuntimeError("operation not permitted when stream is capturing")

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Recording)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


@pytest.mark.parametrize("records", [True, False])
def test_work_is_timed_in_a_graph_where_it_can_be_recorded(monkeypatch, records):
    clock, called = Clock(monkeypatch, records), []
    calls = [lambda: called.append(0), lambda: called.append(1)]
    took = graph_timing.timed(calls)
    assert (took.microseconds, took.deviation, took.repetitions) == (250.0, 0.0, 200)
    assert took.how == ("graph" if records else "eager")
    assert clock.replays == (202 if records else 0)
    assert called.count(0) == called.count(1) == (4 if records else 3 + 201)
    assert graph_timing.timed(calls, record=False).how == "eager"
    assert graph_timing.timed_as_is(calls[0]) == 50.0
