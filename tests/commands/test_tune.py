"""qmix tune and what qmix doctor says of it, without a GPU."""

import io
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from qmix.commands import tune
from qmix.commands.diagnosis import PACKAGES, Facts
from qmix.commands.tuning_findings import tunings
from qmix.errors import ResourceError, UnsupportedError
from qmix.evals.timing import random_model
from qmix.generation import packed_layers, tuner
from qmix.generation.tuner import Tuner
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.tuning import axes, cache_file
from qmix.tuning.cache_file import Entry, TuningKey
from qmix.tuning.search import Outcome
from tests.support.models import TINY, small_config
from tests.support.process import CARD, qmix

FAST = StepTuning(gate_up=replace(UNTUNED.gate_up, warps=2))
KEY = TuningKey(
    gpu=CARD.name, capability="8.6", driver=CARD.driver, triton="1.0",
    kernels=cache_file.kernel_hash(), shapes="4096x14336, 1 rows",
)  # fmt: skip


class Trials:
    def prepare(self, candidates):
        pass

    def measure(self, tuning):
        if tuning.down.warps == 1:
            raise RuntimeError("out of resource: registers")
        return Outcome(80.0 if tuning.gate_up.warps == 2 else 100.0, 0.0)


@pytest.fixture(scope="module")
def model():
    widths = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    config = small_config(**widths, num_attention_heads=4)
    return random_model.build_random_model(config, random_model.NF4, torch.device("cpu"))


def test_each_number_of_rows_is_searched_and_told(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        tuner, "key_of", lambda model, rows, device: replace(KEY, shapes=f"{rows} rows")
    )
    path = tmp_path / "tuning.json"
    now = iter(range(10000))
    own = Tuner(
        path=path,
        make_trials=lambda *_: Trials(),
        stream=io.StringIO(),
        clock=lambda: next(now) / 100,
    )
    report = tune.search_all(model, own, full=True)
    lines = report.text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["1 rows", "8 rows", "16 rows"]
    assert lines[0].startswith("1 rows: 20.0 % faster with gate_up.warps 2; ")
    document = json.loads(json.dumps(report.to_dict()))
    first = document["tunings"][0]
    assert (first["microseconds"], first["untuned_microseconds"]) == (80.0, 100.0)
    assert "gate_up.warps 2, down.warps 1" in first["rejected"]
    assert axes.from_json(first["tuning"]) == FAST
    assert len(cache_file.load(path).entries) == 3


def test_what_cannot_be_tuned_says_why(model, monkeypatch):
    monkeypatch.setattr(packed_layers, "supported", lambda decoder: False)
    with pytest.raises(UnsupportedError, match="qmix doctor"):
        tune.search_all(model, Tuner(), full=False)
    monkeypatch.setattr(type(model), "store", object())
    with pytest.raises(ResourceError, match="do not all fit"):
        tune.search_all(model, Tuner(), full=False)


def test_a_cpu_is_refused_before_anything_is_loaded():
    done = qmix("tune", TINY, "--device", "cpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert "only a GPU is tuned; expected cuda; found cpu" in done.stderr


@pytest.fixture
def facts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("QMIX_TUNE", "1")
    facts = object.__new__(Facts)
    vars(facts).update(gpus=(CARD,), versions=dict.fromkeys(PACKAGES, "1.0"))
    return facts


def entry(key=KEY, *, complete=True):
    return Entry(
        key=key, tuning=axes.to_json(FAST), microseconds=80.0, untuned=100.0, complete=complete, date=""
    )  # fmt: skip


def test_doctor_says_which_tuning_is_in_use(facts, monkeypatch):
    (found,) = tunings(facts)
    assert (found.state, found.found) == ("note", f"{CARD.name}: not tuned yet")
    assert "20 s" in found.remedy
    cache_file.save(entry(replace(KEY, driver="1")))
    (found,) = tunings(facts)
    assert "another driver" in found.found
    cache_file.save(entry(complete=False))
    (found,) = tunings(facts)
    assert found.state == "ok"
    assert found.found == f"{CARD.name}: 20.0 % faster (4096x14336, 1 rows, ended early)"
    cache_file.default_path().write_text("{")
    (found,) = tunings(facts)
    assert "(ignored)" in found.found
    monkeypatch.setenv("QMIX_TUNE", "0")
    (found,) = tunings(facts)
    assert found.found == "the defaults, as QMIX_TUNE=0 says"


def test_doctor_says_nothing_without_a_gpu_or_triton(facts):
    vars(facts).update(versions={**facts.versions, "triton": None})
    assert list(tunings(facts)) == []
    vars(facts).update(gpus=())
    assert list(tunings(facts)) == []
