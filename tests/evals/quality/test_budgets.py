"""What `auto` predicts beside what is measured: the rows, the fit, the picture, what is refused."""

import json
import math

import pytest

from qmix.evals import accuracy, corpus
from qmix.evals.quality import budgets
from qmix.evals.quality.budgets import BudgetScore, budget_table, fit, score_budgets
from qmix.evals.quality.texts import Text
from qmix.quantize.calibrated.windows import calibration_windows
from qmix.quantize.streaming import quantize_streaming
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.calibration import TEXT
from tests.support.models import write_dense
from tests.support.variant_scores import score

pytestmark = pytest.mark.usefixtures("one_thread")


def budget_score(bits, predicted, measured):
    found = score(f"auto-{bits:g}", measured, bits=bits, group=None, schemes={"int4 g128": 84})
    return BudgetScore(budget=bits, predicted=predicted, score=found)


SCORES = [budget_score(bits, p, 0.25 * p**0.9) for bits, p in ((2.5, 0.2), (4.25, 0.02), (6, 0.01))]


def test_the_fit_finds_the_line_that_the_logarithms_lie_on():
    found = fit(SCORES)
    assert found.correlation == pytest.approx(1)
    assert found.exponent == pytest.approx(0.9)
    assert found.factor == pytest.approx(0.25)
    worse = fit([*SCORES[:2], budget_score(6, 0.01, 0.2)])
    assert worse.correlation < 0.5


def test_each_budget_is_quantized_and_costs_about_what_is_predicted(tmp_path, monkeypatch):
    def to_nearest(opened, out, recipe, *_, method):
        """Rounds as the prediction does, and takes a tenth of the time."""
        quantize_streaming(opened.shards.directory, out, recipe, method=method)

    monkeypatch.setattr(budgets, "quantize_calibrated", to_nearest)
    source = write_dense(
        tmp_path / "source",
        hidden_size=128,
        intermediate_size=128,
        initializer_range=0.1,
        num_hidden_layers=1,
        num_local_experts=2,
    )
    encode = LlamaTokenizer.from_pretrained(source).encode
    calibration = calibration_windows(TEXT, encode, samples=2, seqlen=32)
    said = []
    bits = (4.25, 5, 8.125)
    found = score_budgets(bits, source, calibration, Text.of(TEXT[:1500]), say=said.append)
    assert [each.budget for each in found] == list(bits)
    assert said.count("auto-4.25: measuring the groups") == 1
    assert sum("measuring" in line for line in said) == 1  # equal choices are measured once
    predicted = [each.predicted for each in found]
    assert predicted == sorted(predicted, reverse=True)
    for each in found:
        assert 4.125 <= each.score.bits_per_weight <= each.budget + 1e-9
        assert each.ratio == pytest.approx(each.score.kl / each.predicted)
        assert 0.5 < each.ratio < 3
    assert found[2].score.kl < found[0].score.kl


def test_the_command_prints_and_draws_predictions_beside_measurements(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(corpus, "training_text", lambda: "Return a list of the names. " * 40)
    monkeypatch.setattr(corpus, "heldout_text", lambda: "Delete the names. " * 20)
    monkeypatch.setattr(accuracy, "score_budgets", lambda *_, **__: SCORES)
    out, picture = tmp_path / "record.json", tmp_path / "chart.svg"
    options = ["--budgets", "2.5", "4.25", "6", "--samples", "2", "--seqlen", "32"]
    options += ["--out", str(out), "--picture", str(picture)]
    assert accuracy.main(options) == 0
    captured = capsys.readouterr()
    assert "correlation of the logarithms 1.0000" in captured.out
    assert captured.out.startswith(budget_table(SCORES))
    record = json.loads(out.read_text())
    assert "--budgets 2.5 4.25 6" in record["command"]
    assert [each["budget"] for each in record["budgets"]] == [2.5, 4.25, 6]
    measured = record["budgets"][1]
    assert math.isclose(measured["measured_kl"], 0.25 * measured["predicted_kl"] ** 0.9)
    assert record["fit"]["exponent"] == pytest.approx(0.9)
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--budgets 4.25 4.5", "too few, or one twice"),
        ("--budgets 4.25 4.5 4.5 5", "too few, or one twice"),
        ("--budgets 1 4.25 5", "--bits: out of range"),
        ("--budgets 4.25 4.5 5 --only nf4", "--only: does not apply to --budgets"),
        ("--budgets 4.25 4.5 5 --calibrations 2", "--calibrations: does not apply"),
        ("--picture chart.svg", "--picture: applies to --budgets only"),
        ("--budgets 4.25 4.5 5 --picture chart.txt", "--picture: not a name"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(capsys, options, words):
    assert accuracy.main(options.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert words in line
