"""A killed run goes on and ends with the same bytes; a run with other settings does not."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from qmix.commands.checkpoint.verify import verify
from qmix.errors import InterruptedRunError, UsageError
from qmix.formats.files import manifest
from qmix.quantize.rounding import gptq
from qmix.weights.scheme import Recipe, Scheme
from tests.support.calibration import TEXT, contents, run, windows, write_source
from tests.support.models import threads
from tests.support.process import python, qmix

LAYERS = 3
STATE = manifest.STATE
QUICK = gptq.RoundingOptions(trials=1, refine=1)

pytestmark = pytest.mark.usefixtures("one_thread")

# What replaces a function of qmix in the process that will kill itself. `die()` is SIGKILL.
STAGES = {
    "before the first layer ends": """
def finish(self): die()
LayerQuantizer._add_experts = finish
""",
    "within a shard of a middle layer": """
write = ShardWriter.write
def dying(self, name, tensor):
    if "layers.1.block_sparse_moe" in name: die()
    write(self, name, tensor)
ShardWriter.write = dying
""",
    "between a shard and its tokens": """
Activations.save = lambda self, path: die()
""",
    "after one of two arrays of tokens": """
save = Activations.save
def dying(self, path):
    digest = save(self, path)
    if "00002" in path.name: die()
    return digest
Activations.save = dying
""",
    "between the tokens and the state": """
RunState.write = lambda self, folder: die()
""",
    "within the second state": """
write = RunState.write
def dying(self, folder):
    if len(self.results) == 2:
        (folder / "qmix_resume.json.writing").write_text('{"settings": {')
        die()
    write(self, folder)
RunState.write = dying
""",
    "after the state, before the old tokens go": """
write = RunState.write
def dying(self, folder):
    write(self, folder)
    if len(self.results) == 2: die()
RunState.write = dying
""",
    "within a middle layer": """
original = LayerQuantizer._round_experts
def dying(self, experts, routes, exact_routes):
    if self._layer == 1 and 2 in experts: die()
    original(self, experts, routes, exact_routes)
LayerQuantizer._round_experts = dying
""",
    "within the next layer, beside which tokens are saved": """
begun = threading.Event()
save, rounded = Activations.save, LayerQuantizer._round_experts
def saving(self, path):
    begun.wait()
    return save(self, path)
def dying(self, experts, routes, exact_routes):
    if self._layer == 2: die()
    if self._layer == 1: begun.set()
    rounded(self, experts, routes, exact_routes)
Activations.save, LayerQuantizer._round_experts = saving, dying
""",
    "within the final checksums": """
manifest.write_manifest = lambda folder, facts: die()
""",
}

KILLED = """
import os, signal, sys, threading, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.support.calibration import run, windows
from qmix.formats.files.shard_writer import ShardWriter
from qmix.formats.files import manifest
from qmix.quantize.calibrated.activations import Activations
from qmix.quantize.calibrated.layer import LayerQuantizer
from qmix.quantize.calibrated.resume import RunState
def die(): os.kill(os.getpid(), signal.SIGKILL)
{stage}
run(Path({source!r}), Path({out!r}), activation_bytes={budget})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A source, and what an uninterrupted run makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    source = write_source(folder / "source", num_hidden_layers=LAYERS)
    with threads(1):
        run(source, folder / "out")
    return source, contents(folder / "out")


def process(code):
    return python(code, environment={"PYTHONWARNINGS": "error"})


# The gate kills it within a file, between two files, within the state and within the last step.
LEFT_TO_SOAK = (
    "before the first layer ends",
    "between the tokens and the state",
    "after the state, before the old tokens go",
    "within a middle layer",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "budget"),
    [
        pytest.param(
            stage,
            0 if number % 2 and "beside" not in stage else 1 << 30,
            marks=[pytest.mark.soak] * (stage in LEFT_TO_SOAK),
        )
        for number, stage in enumerate(STAGES)
    ],
    ids=[f"{stage}, tokens in {('memory', 'files')[n % 2]}" for n, stage in enumerate(STAGES)],
)
def test_killed_and_resumed_it_ends_with_the_same_bytes(whole, tmp_path, stage, budget):
    source, expected = whole
    out = tmp_path / "out"
    code = KILLED.format(stage=STAGES[stage], source=str(source), out=str(out), budget=budget)
    killed = process(code)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    run(source, out, resumed=True)
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def stopped(whole, tmp_path):
    """(source, OUT, what the whole run gives) of a run that ended after its first layer."""
    source, expected = whole
    with pytest.raises(InterruptedRunError):
        run(source, tmp_path / "out", interrupted=lambda: True)
    return source, tmp_path / "out", expected


def test_layer_by_layer_with_the_tokens_now_in_memory_now_in_files(stopped):
    source, out, expected = stopped
    with pytest.raises(InterruptedRunError, match="after layer 2 of 3"):
        run(source, out, resumed=True, activation_bytes=0, interrupted=lambda: True)
    run(source, out, resumed=True)
    assert contents(out) == expected
    report = json.loads((out / manifest.REPORT).read_text())
    assert len(report["tensors"]) == LAYERS * (4 + 3 * 4)  # of the layers before the stop too


OTHERS = {
    "calibration": {"calibration": windows(2)},
    "calibration ": {"calibration": replace(windows(), ids=windows().ids[:3])},
    "rounding": {"rounding": replace(QUICK, refine=2)},
    "rounding ": {"rounding": replace(QUICK, damping=0.01)},
    "weighting": {"weighting": "none"},
    "correction": {"correct": False},
    "objective": {"objective": "loss"},
    "recipe": {"recipe": Recipe.uniform(Scheme(kind="int4", group_size=32), attention=False)},
    "method": {"method": "auto"},
}


@pytest.mark.parametrize("field", OTHERS)
def test_other_settings_are_refused_by_the_fields_name(stopped, field):
    source, out, expected = stopped
    before = contents(out.with_name("out.partial"))
    with pytest.raises(UsageError, match=rf"the interrupted run had another {field.strip()}; "):
        run(source, out, resumed=True, **OTHERS[field])
    assert contents(out.with_name("out.partial")) == before
    run(source, out, resumed=True)
    assert contents(out) == expected


def test_so_are_another_number_of_threads_and_another_source(stopped, tmp_path):
    source, out, _ = stopped
    before = contents(out.with_name("out.partial"))
    torch.set_num_threads(2)
    with pytest.raises(
        UsageError, match="another number of threads; expected 1; found 2"
    ) as caught:
        run(source, out, resumed=True)
    assert caught.value.exit_code == 2
    torch.set_num_threads(1)
    other = write_source(tmp_path / "other", num_hidden_layers=LAYERS, initializer_range=0.1)
    with pytest.raises(UsageError, match=r"another source: config\.json"):
        run(other, out, resumed=True)
    assert contents(out.with_name("out.partial")) == before


def test_without_resume_it_is_refused_and_nothing_is_deleted(stopped):
    source, out, _ = stopped
    before = contents(out.with_name("out.partial"))
    for force in (False, True):
        with pytest.raises(
            UsageError, match=r"out\.partial: an interrupted run left its work here.*--resume"
        ):
            run(source, out, force=force)
    assert contents(out.with_name("out.partial")) == before


def test_resume_with_nothing_there_starts(whole, tmp_path):
    source, expected = whole
    run(source, tmp_path / "out", resumed=True)
    assert contents(tmp_path / "out") == expected


def test_what_is_not_ours_is_never_resumed_nor_deleted(whole, tmp_path):
    source, _ = whole
    folder = tmp_path / "out.partial"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for resumed in (False, True):
        with pytest.raises(UsageError, match="something that qmix did not write"):
            run(source, tmp_path / "out", resumed=resumed)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


SIGNALLED = """
import os, signal, sys, threading, torch
torch.set_num_threads(1)
from qmix.quantize.calibrated.layer import LayerQuantizer
original = LayerQuantizer._round_experts
def signalled(self, experts, routes, exact_routes):
    if self._layer == 1 and 2 in experts:
        for number in {signals}: os.kill(os.getpid(), number)
    original(self, experts, routes, exact_routes)
LayerQuantizer._round_experts = signalled
sys.argv = ["qmix", *{arguments!r}]
from qmix.cli import main
main()
"""


def arguments(source, out, text):
    return [
        "quantize", str(source), str(out), "--method", "gptq", "--group-size", "32",
        "--samples", "4", "--seqlen", "32", "--device", "cpu", "--calibration", str(text),
    ]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_ctrl_c_ends_after_the_layer_with_75_and_the_command_goes_on(whole, tmp_path, text):
    source, _ = whole
    out = tmp_path / "out"
    command = arguments(source, out, text)
    found = process(SIGNALLED.format(signals="[signal.SIGINT]", arguments=command))
    assert found.returncode == 75, found.stderr
    assert found.stdout == ""
    assert "stopping after this layer; Ctrl-C again stops at once" in found.stderr
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith(f"qmix: {out}.partial: interrupted after layer 2 of 3")
    assert last.endswith("--resume to continue.")
    assert "Traceback" not in found.stderr
    assert not out.exists()
    state = json.loads((tmp_path / "out.partial" / STATE).read_text())
    assert len(state["results"]) == 2

    again = qmix(*command)
    assert again.returncode == 2, again.stderr
    assert "Continue it with --resume" in again.stderr
    resumed = qmix(*command, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    (tmp_path / "plain").mkdir()
    plain = qmix(*arguments(source, tmp_path / "plain" / "out", text))  # its card names it
    assert plain.returncode == 0, plain.stderr
    assert contents(out) == contents(tmp_path / "plain" / "out")
    assert verify(out).problems == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "text.txt"]


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_finished_layers(whole, tmp_path, text):
    source, _ = whole
    command = arguments(source, tmp_path / "out", text)
    found = process(SIGNALLED.format(signals="[signal.SIGINT, signal.SIGINT]", arguments=command))
    assert found.returncode == 130, found.stderr
    assert "Traceback" not in found.stderr
    state = json.loads((tmp_path / "out.partial" / STATE).read_text())
    assert len(state["results"]) == 1
    assert not (tmp_path / "out").exists()


def test_handlers_of_signals_are_put_back():
    from qmix.commands import terminal

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with terminal.interruptible() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
