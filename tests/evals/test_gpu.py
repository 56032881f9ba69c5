"""The GPU acceptance command where there is no GPU: skipped visibly, and rehearsed."""

import json
import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from tests.support.models import ROOT

pytest.importorskip("triton")

from qmix.evals import gpu
from qmix.evals.acceptance.record import AcceptanceRecord, StepOutcome
from qmix.evals.acceptance.step import STEPS, Step

HAS_GPU = torch.cuda.is_available()
# What torch and Triton bring is all that a bare checkout has.
MISSING = ("tokenizers", "sentencepiece", "safetensors", "typer", "prompt_toolkit", "starlette")


def test_a_bare_checkout_imports_no_other_library():
    """Modules do so where they need one, and not at their top; commands and server aside."""
    found = []
    for path in [*(ROOT / "qmix").glob("[!cs]*/**/*.py"), *(ROOT / "evals").glob("[ast]*/*.py")]:
        text = path.read_text(encoding="utf-8")
        lines = [f"{kind} {name}" for name in MISSING for kind in ("import", "from")]
        found += [(path.name, line) for line in text.splitlines() if line.startswith(tuple(lines))]
    assert set(found) == {("train_tokenizer.py", "import sentencepiece")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A bare copy of the sources, with nothing installed and no git."""
    root = tmp_path_factory.mktemp("bare") / "checkout"
    root.mkdir()
    for name in ("qmix", "quantize", "evals"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cli.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    return root


def command(checkout, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "qmix.evals.gpu", *map(str, arguments)],
        cwd=checkout, capture_output=True, text=True, timeout=3600, check=False,
    )  # fmt: skip


def record_in(out):
    (path,) = out.glob("*-acceptance.json")
    return path, json.loads(path.read_text())


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_all_but_the_bandwidth_is_skipped(checkout, tmp_path):
    out = tmp_path / "a folder"
    done = command(checkout, "--out", out, "--budget", "120")
    assert done.returncode == 0, done.stderr
    path, record = record_in(out)
    assert path.name.endswith("-no-gpu-acceptance.json")
    states = {name: step["status"] for name, step in record["steps"].items()}
    assert states.pop("bandwidth") == "ok"
    assert set(states) == {step.name for step in STEPS} - {"bandwidth"}
    assert set(states.values()) == {"skipped"}
    assert {step["error"] for step in record["steps"].values()} == {None, "no CUDA device"}
    copied = record["steps"]["bandwidth"]["results"][0]
    assert copied["what"] == "copy"
    assert copied["gigabytes_per_second"] > 0.1
    assert record["revision"] is None
    assert record["versions"]["torch"] == torch.__version__
    given = ["--out", str(out), "--budget", "120"]
    assert shlex.split(record["command"]) == ["python3", "-m", "qmix.evals.gpu", *given]
    table = path.with_suffix(".md").read_text()
    assert table == done.stdout
    assert "## experts: skipped" in table


def test_a_step_that_kills_the_worker_costs_itself_and_may_be_continued(checkout, tmp_path):
    """Real steps in a real worker, on the CPU; the second run does only what the first did not."""
    out = tmp_path / "out"
    names = ["bandwidth", "nf4 tg64 untuned", "nf4 tg64"]
    only = [word for name in names for word in ("--only", name)]
    options = [*only, "--rehearse", "--budget", "3000"]
    first = command(checkout, "--out", out, *options, "--fail", f"{names[1]}=die")
    assert first.returncode == 1, first.stderr
    steps = record_in(out)[1]["steps"]
    assert [steps[name]["status"] for name in names] == ["ok", "failed", "ok"]
    assert [row["test"] for row in steps[names[1]]["results"]] == ["build"]
    assert "signal 11" in steps[names[1]]["error"]
    refused = command(checkout, "--out", out, *options)
    assert refused.returncode == 2
    assert "--continue" in refused.stderr
    second = command(checkout, "--continue", out, *options)
    assert second.returncode == 0, second.stderr
    begun = [line.split(":")[0] for line in second.stderr.splitlines() if "at most" in line]
    assert begun == [names[1]]
    steps = record_in(out)[1]["steps"]
    assert [row["test"] for row in steps[names[1]]["results"]] == ["build", "tg4"]


@pytest.mark.soak
def test_every_step_is_rehearsed(checkout, tmp_path):
    out = tmp_path / "out"
    done = command(checkout, "--out", out, "--rehearse", "--budget", "3000")
    assert done.returncode == 0, done.stderr
    _, record = record_in(out)
    skipped = {name for name, step in record["steps"].items() if step["status"] != "ok"}
    assert {name for name in skipped if not name.startswith("peer ")} == {"tests"}


def test_every_step_has_a_module():
    for step in STEPS:
        assert callable(import_module(f"qmix.evals.steps.{step.module}").results)


def test_names_are_unique_and_the_time_is_that_of_the_budget():
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert all(0 < step.seconds <= gpu.BUDGET_SECONDS / 2 for step in STEPS)


def test_an_unknown_step_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", "x", "--only", "nothing"])
    assert "invalid choice" in capsys.readouterr().err


def test_a_folder_without_a_journal_is_not_continued(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--continue", str(tmp_path)])
    assert "no journal" in capsys.readouterr().err


def test_a_record_goes_into_a_folder(tmp_path, capsys):
    file = tmp_path / "record"
    file.write_text("")
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(file)])
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-5", "nan", "inf", "long"])
def test_a_budget_is_a_positive_number(tmp_path, capsys, seconds):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "out"), f"--budget={seconds}"])
    assert "--budget" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_measured_is_no_success(tmp_path, monkeypatch, capsys):
    skipped = AcceptanceRecord(
        command="", date="", gpu=None, driver=None, versions={}, revision=None, budget=1.0,
        machine={}, steps={"a": StepOutcome("skipped")},
    )  # fmt: skip
    monkeypatch.setattr(gpu, "run_steps", lambda *given: skipped)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "skipped" in capsys.readouterr().out


def test_steps_that_were_tried_come_last(tmp_path):
    from qmix.evals.acceptance.journal import Journal

    journal = Journal(tmp_path)
    for name, end in (("a", "failed"), ("b", "ok"), ("c", "skipped")):
        journal.add({"step": name})
        journal.add({"step": name, "end": end, "seconds": 1.0})
    journal.add({"step": "d"})
    steps = [Step(name, "module", 1) for name in "abcdef"]
    assert [step.name for step in gpu._unfinished(steps, journal)] == ["e", "f", "a", "d"]
