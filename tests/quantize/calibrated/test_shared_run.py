"""A calibrated run that several processes share: the bytes of one, also after one was lost."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from qmix.errors import CheckpointError, InterruptedRunError
from qmix.processes.group import Group
from qmix.quantize.calibrated.follower import follow_quantize
from qmix.quantize.calibrated.options import CalibratedOptions, LayerOptions
from qmix.quantize.source import open_source
from tests.support.calibration import QUICK, TEXT, WINDOW, contents, run, spoil, write_source
from tests.support.process import PATIENCE, environment_of_child
from tests.support.process_group import together

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS = CalibratedOptions(layer=LayerOptions(rounding=QUICK))


@pytest.fixture(autouse=True)
def _a_batch_a_window(monkeypatch):
    monkeypatch.setattr("qmix.quantize.calibrated.shared_windows.BATCH_TOKENS", WINDOW)
    monkeypatch.setattr("qmix.quantize.calibrated.token_stream.BATCH_TOKENS", WINDOW)
    monkeypatch.setattr("qmix.quantize.calibrated.loss_gradients._BATCH_TOKENS", WINDOW)


@pytest.fixture
def source(tmp_path):
    """Three experts, all of them a token's: the order of sums shows."""
    return write_source(tmp_path / "source", num_local_experts=3, num_experts_per_tok=3)


def shared(source, out, processes, **options):
    lead = partial(run, source, out, objective="loss", **options)
    follow = partial(follow_quantize, lambda: open_source(source), LOSS)
    leader = lambda group: lead(group=group)  # noqa: E731
    follower = lambda group: follow(group=group)  # noqa: E731
    return together(leader, *[follower] * (processes - 1))[0]


def test_several_processes_write_the_bytes_of_one_also_after_one_was_lost(source, tmp_path):
    report = run(source, tmp_path / "one", objective="loss")
    once = iter([True])
    with pytest.raises(InterruptedRunError):
        shared(source, tmp_path / "three", 3, interrupted=lambda: next(once, False))
    assert not list((tmp_path / "three.partial").glob("*.writing"))
    resumed = run(source, tmp_path / "three", objective="loss", resumed=True)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert [r.output_error for r in resumed.tensors] == [r.output_error for r in report.tensors]
    layers = []

    def help_until_lost(group):
        def exchange(items):
            found = group.exchange(items)
            layers.extend(item for item in found if item == ("layer", 1))
            if layers:
                raise SystemExit("killed")
            return found

        lossy = Group(group.rank, group.size, exchange)
        follow_quantize(lambda: open_source(source), LOSS, lossy)

    with pytest.raises(SystemExit):
        together(
            lambda group: run(source, tmp_path / "two", objective="loss", group=group),
            help_until_lost,
        )
    shared(source, tmp_path / "two", 2, resumed=True)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_what_is_wrong_with_an_expert_is_said_by_whoever_has_it(source, tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    spoil(source, name, float("nan"))
    with pytest.raises(CheckpointError, match=r"experts\.2\.w2"):
        shared(source, tmp_path / "out", 2)


def process_of(rank, out):
    """The number of the process that has this rank among those that write `out`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(out) in words and b"RANK=%d" % rank in (
                folder / "environ"
            ).read_bytes().split(b"\0"):
                return int(folder.name)
    return None


@pytest.mark.soak
def test_the_command_in_three_processes_of_which_one_is_killed(tmp_path):
    pytest.importorskip("accelerate")
    write_source(tmp_path / "source")
    (tmp_path / "text.txt").write_text(TEXT)
    environment = environment_of_child(OMP_NUM_THREADS="1")

    def command(out, *more):
        words = ["quantize", tmp_path / "source", tmp_path / out, "--method", "gptq"]
        words += ["--samples", 5, "--seqlen", 64, "--calibration", tmp_path / "text.txt", *more]
        return subprocess.Popen(
            [sys.executable, "-m", "qmix", *map(str, words)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    with command("one") as one, command("three", "--processes", 3) as three:
        work = tmp_path / "three.partial"
        while not list(work.glob("model-00002*.safetensors")) and three.poll() is None:
            time.sleep(0.01)
        os.kill(process_of(2, tmp_path / "three"), signal.SIGKILL)
        said = three.communicate(timeout=PATIENCE)[1]
        assert (three.returncode, "process 2 of 3 was lost" in said) == (1, True), said
        one.communicate(timeout=PATIENCE)
    with command("three", "--processes", 2, "--resume") as two:
        assert (two.communicate(timeout=PATIENCE)[1], two.returncode)[1] == 0
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
