"""`qmix eval --tasks`, where lm_eval is installed."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm-eval]'")

from qmix.errors import CheckpointError
from qmix.evals.harness.task_run import MetricScore, paired, run_tasks
from tests.support.lm_eval_tasks import FILES, FOLDER
from tests.support.process import qmix

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and datasets' own


def score(documents):
    return MetricScore(task="t", metric="m", value=0.0, stderr=None, documents=documents)


def test_two_models_are_compared_document_by_document(tiny, tiny_nf4):
    options = ("--tasks", FILES[0], "--tasks", FILES[1], "--limit", "12", "--device", "cpu")
    result = qmix("eval", tiny_nf4, *options, "--against", tiny, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [model["name"] for model in document["models"]] == [tiny_nf4.name, tiny.name]
    scores = {one["metric"]: one for one in document["models"][0]["scores"]}
    assert set(scores) == {
        "acc", "acc_norm", "word_perplexity", "byte_perplexity", "bits_per_byte"
    }  # fmt: skip
    assert {one["documents"] for one in scores.values()} == {12}
    metrics = [one["metric"] for one in document["models"][0]["scores"]]
    less = dict(zip(metrics, document["differences"][0]["metrics"], strict=True))
    other = {one["metric"]: one["value"] for one in document["models"][1]["scores"]}
    assert less["acc"]["value"] == pytest.approx(scores["acc"]["value"] - other["acc"])
    assert less["word_perplexity"]["value"] == pytest.approx(
        scores["word_perplexity"]["value"] / other["word_perplexity"], rel=1e-6
    )
    assert less["word_perplexity"]["interval"]["low"] < less["word_perplexity"]["value"]
    shown = qmix("eval", tiny_nf4, *options, "--against", tiny)
    assert "qmix_choice acc (12)" in shown.stdout
    assert "word_perplexity: ratio" in shown.stdout


def test_a_file_that_is_no_task_is_named(tiny, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    no_data = tmp_path / "no_data.yaml"
    shutil.copy(FILES[0], no_data)
    for path in (tmp_path / "nowhere.yaml", broken, no_data):
        with pytest.raises(CheckpointError, match=path.name):
            run_tasks(tiny, [path])


def test_data_is_found_beside_its_task_or_where_one_stands(tiny, tmp_path, monkeypatch):
    task = tmp_path / "apart.yaml"
    shutil.copy(FOLDER / "qmix_choice.yaml", task)
    monkeypatch.chdir(FOLDER)
    found = run_tasks(tiny, [task], limit=2, device="cpu")
    assert [one.metric for one in found] == ["acc", "acc_norm"]


def test_documents_that_add_nothing_have_no_difference():
    assert paired(score(()), score(())) is None
    assert paired(score((1.0,)), score((1.0, 0.0))) is None
    assert paired(score((1.0, 0.0)), score((0.0, 0.0))).value == 0.5
    assert paired(score(((-2.0, 1.0),)), score(((-2.0, 1.0),))).value == 1.0
