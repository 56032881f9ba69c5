"""`qmix bench --attention`: what is run, what is left out and why, the table, the plot."""

import json
import sys

import pytest
import torch

from qmix.errors import UsageError
from qmix.evals.timing import attention_bench, attention_plot
from qmix.evals.timing.attention_bench import AttentionRequest, HeadShape
from qmix.kernels import flash
from tests.support.process import qmix

CPU = torch.device("cpu")
FEW = HeadShape(queries=4, shared=2, width=8)


def compared(prompts, windows, heads=FEW, repetitions=2):
    request = AttentionRequest(
        prompts=prompts, windows=windows, heads=heads, dtype=torch.float32, device=CPU
    )
    return attention_bench.run_attention_bench(request, repetitions=repetitions)


def ticking(monkeypatch, *times):
    """Each call takes the next of `times`, again and again; returns how often any was called."""
    calls = []

    def seconds(work, device):
        work()
        calls.append(device)
        return times[(len(calls) - 1) % len(times)]

    monkeypatch.setattr(attention_bench, "seconds", seconds)
    return calls


def test_the_best_repetition_counts_beside_eager(monkeypatch):
    calls = ticking(monkeypatch, 0.4, 0.2, 0.5, 0.05)
    eager, sdpa = (one for one in compared([16], [None]).measurements if one.best is not None)
    assert (eager.attention, eager.best, eager.tokens_per_second) == ("eager", 0.2, 80)
    assert (sdpa.attention, sdpa.best, sdpa.tokens_per_second) == ("sdpa", 0.05, 320)
    assert eager.seconds == (0.4, 0.2)
    assert (eager.against_eager, sdpa.against_eager) == (1, 4)
    assert len(calls) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_cannot_run_here_is_named_with_its_reason():
    report = compared([16, 24], [None, 8])
    for prompt in (16, 24):
        for window in (None, 8):
            found = {
                one.attention: one
                for one in report.measurements
                if (one.prompt, one.window) == (prompt, window)
            }
            assert list(found) == ["eager", "sdpa", "flash_attention_2", "triton"]
            assert "needs a CUDA device" in found["triton"].left_out
            assert found["flash_attention_2"].left_out
            assert found["triton"].best is found["triton"].against_eager is None
    lines = report.markdown().splitlines()
    assert sum("needs a CUDA device" in line for line in lines) == 4
    assert lines[0].startswith("| prompt | window | attention | ms |")


def test_flash_attention_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(flash, "check_installed", lambda: None)
    found = compared([16], [None]).measurements[2]
    assert (found.attention, found.best) == ("flash_attention_2", None)
    assert "does not fit" in found.left_out
    assert "float32 on cpu" in found.left_out


def test_a_window_that_no_prompt_reaches_is_not_measured_twice():
    report = compared([16, 32], [None, 16])
    assert {(one.prompt, one.window) for one in report.measurements} == {
        (16, None), (32, None), (32, 16),
    }  # fmt: skip


def test_what_does_not_fit_the_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(attention_bench, "_free_bytes", lambda device: 4 * 12 * 64 * 64)
    report = compared([64, 65], [None])
    eager = [one for one in report.measurements if one.attention == "eager"]
    assert eager[0].best is not None
    assert eager[1].best is None
    assert "memory" in eager[1].left_out
    sdpa = [one for one in report.measurements if one.attention == "sdpa"][1]
    assert sdpa.best is not None
    assert sdpa.against_eager is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_peak_is_that_of_the_call_alone():
    wide = HeadShape(queries=8, shared=2, width=16)
    found = compared([1024], [None], heads=wide, repetitions=1).measurements
    eager, sdpa = found[0].peak_bytes, found[1].peak_bytes
    scores = 8 * 1024 * 1024 * 4
    assert 2 * scores < eager < 6 * scores  # five at most, and what huge pages round up
    out = 8 * 1024 * 16 * 4
    assert out <= sdpa < scores / 4


def test_the_command_prints_a_table_and_draws_it(tmp_path):
    target = tmp_path / "attention.html"
    arguments = (
        "bench", "--attention", "--prompts", "32,64", "--window", "16", "-r", "2",
        "--device", "cpu", "--plot", target,
    )  # fmt: skip
    result = qmix(*arguments)
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 2 * 2 * 4
    assert "best of 2" in result.stdout
    assert "32 heads of 128, 8 of keys and values" in result.stdout
    assert result.stderr == f"the picture: {target}\n"
    page = target.read_text()
    for part in ("A eager", "D sdpa, window 16", "not run: triton, 32 tokens", "needs a CUDA"):
        assert part in page
    refused = qmix(*arguments)
    assert (refused.returncode, refused.stdout) == (UsageError.exit_code, "")
    assert "the file exists" in refused.stderr


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture_has_what_was_measured(suffix, tmp_path, monkeypatch):
    ticking(monkeypatch, 0.4, 0.2)
    target = tmp_path / f"attention{suffix}"
    attention_plot.write(compared([16, 24], [None, 16]), target)
    begins = {".svg": b"<svg", ".png": b"\x89PNG"}[suffix]
    assert target.read_bytes().startswith(begins)


def test_the_command_in_json_with_a_models_own_heads(tiny):
    result = qmix(
        "bench", tiny, "--attention", "-p", "24", "-r", "1", "--device", "cpu", "--dtype",
        "bfloat16", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    config = json.loads((tiny / "config.json").read_text())
    assert document["heads"]["queries"] == config["num_attention_heads"]
    assert document["dtype"] == "bfloat16"
    eager = document["measurements"][0]
    assert eager["attention"] == "eager"
    assert eager["tokens_per_second"] == pytest.approx(24 / min(eager["seconds"]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--plot", "a.png"), "--attention"),
        ((), "DIR"),
        (("--attention", "-b", "8"), "--attention"),
        (("--attention", "-p", "many"), "a whole number"),
        (("--attention", "-p", "0"), "1 to 1048576"),
        (("--attention", "--window", "0"), "window"),
        (("--attention", "--plot", "nowhere/a.png"), "nowhere"),
        (("--attention", "--plot", "a.txt"), "NAME.html or NAME.svg or NAME.png"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said):
    result = qmix("bench", *arguments)
    assert result.returncode == UsageError.exit_code, result.stderr
    assert said in result.stderr
