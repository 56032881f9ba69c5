"""The accuracy command on a little text: its table, its record, its rivals, and what it refuses."""

import dataclasses
import json
import re
import shutil

import pytest
import torch

from qmix import MixtralForCausalLM
from qmix.evals import accuracy, corpus
from qmix.evals.quality.scores import (
    ablation_table,
    kl_ratio,
    rival_to_beat,
    score_table,
)
from qmix.evals.quality.variants import FULL, PARTS, PLAIN, ablations, with_part_of
from qmix.evals.quality.window_scores import WindowScore
from qmix.evals.training import tiny_model
from tests.support.models import TINY, quantized
from tests.support.variant_scores import score

WORDS = "Return a list of the names in the current scope. "


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The first layer of the tiny model, as a model."""
    folder = tmp_path_factory.mktemp("accuracy") / "one-layer"
    model = MixtralForCausalLM.from_pretrained(TINY)
    model.model.layers = model.model.layers[:1]
    model.config = model.config.replace(num_hidden_layers=1)
    model.save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.model", folder)
    return folder


@pytest.fixture(autouse=True)
def little(monkeypatch, one_layer):
    monkeypatch.setattr(tiny_model, "directory", lambda: one_layer)
    monkeypatch.setattr(corpus, "training_text", lambda: WORDS * 40)
    monkeypatch.setattr(corpus, "heldout_text", lambda: "Delete the names of that scope. " * 20)


@pytest.fixture
def rivals(tmp_path, one_layer):
    """Two checkpoints, a folder that is none, and a file."""
    parent = tmp_path / "rivals"
    parent.mkdir()
    quantized(one_layer, parent / "b")
    shutil.copytree(parent / "b", parent / "a")
    (parent / "logs").mkdir()
    (parent / "train.txt").write_text("text")
    return parent


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def windows(kl, seed):
    """Twelve of 100 tokens, whose KL scatters by a tenth."""
    noise = torch.rand(12, generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(
        WindowScore(tokens=100, loss=300.0, reference_loss=299.0, kl=100 * kl * (0.95 + 0.1 * x))
        for x in noise
    )


def test_the_table_has_a_row_for_each_and_the_record_says_on_what(capsys, tmp_path):
    out = tmp_path / "record.json"
    options = "--only rtn-g32 gptq-g128 --samples 2 --seqlen 32 --out"
    assert accuracy.main([*options.split(), str(out)]) == 0
    captured = capsys.readouterr()
    header, rule, *rows = captured.out.splitlines()[:5]
    assert cells(header)[:4] == ["model", "bits/weight", "perplexity", "mean KL"]
    assert cells(rule) == ["---"] * 6
    assert [cells(row)[:2] for row in rows] == [
        ["bf16", "16.000"],
        ["rtn-g32", "4.500"],
        ["gptq-g128", "4.125"],
    ]
    assert "gptq-g128: quantizing" in captured.err
    record = json.loads(out.read_text())
    assert record["calibration"]["windows"] == 2
    assert record["calibration"]["tokens_a_window"] == 32
    assert record["text"]["sha256"] in captured.out
    assert [one["name"] for one in record["scores"]] == ["rtn-g32", "gptq-g128"]
    assert all(0 < one["kl_mean"] < 1 for one in record["scores"])
    assert record["scores"][1]["schemes"] == {"int4 g128": 28}
    printed = [cells(row)[2] for row in rows]
    assert [f"{one['perplexity']:.4f}" for one in record["scores"]] == printed[1:]
    assert f"{record['text']['bf16_perplexity']:.4f}" == printed[0]
    assert len(set(printed)) == 3
    assert str(tmp_path) not in out.read_text()


def test_a_method_is_calibrated_on_texts_of_their_own(capsys, monkeypatch):
    texts = [WORDS * 40, "An object is what a name refers to. " * 40]
    monkeypatch.setattr(corpus, "training_parts", lambda count: tuple(texts[:count]))
    options = "--calibrations 2 --only gptq-g128-layer --samples 2 --seqlen 32 --json"
    assert accuracy.main(options.split()) == 0
    document = json.loads(capsys.readouterr().out)
    first, second, mean = document["scores"]
    assert [each["name"][-3:] for each in (first, second, mean)] == ["r 1", "r 2", "f 2"]
    assert first["kl_mean"] != second["kl_mean"]
    assert mean["kl_mean"] == pytest.approx((first["kl_mean"] + second["kl_mean"]) / 2)
    root = (first["perplexity"] * second["perplexity"]) ** 0.5
    assert mean["perplexity"] == pytest.approx(root)
    assert "--calibrations 2" in document["command"]


def test_the_calibration_text_is_scored_beside_the_held_out_one(capsys):
    options = "--overfit --only nf4 --samples 2 --seqlen 32"
    assert accuracy.main([*options.split(), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (one,) = document["scores"]
    assert one["calibration_kl_mean"] > 0
    row = cells(document["table"][-1])
    assert row[-2] == f"{one['calibration_kl_mean']:.5f}"
    assert row[-1] == f"{one['kl_mean'] / one['calibration_kl_mean']:.2f}"
    assert cells(document["table"][2])[-2:] == ["-", "-"]
    assert "--overfit" in document["command"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_record_that_cannot_be_written_is_one_line_after_the_result(
    capsys, tmp_path, monkeypatch, as_json
):
    monkeypatch.setattr(accuracy, "_scores", lambda *_: [score("nf4", 0.01)])
    (tmp_path / "folder").mkdir()
    options = ["--only", "nf4", "--samples", "2", "--seqlen", "32", "--out"]
    options += [str(tmp_path / "folder"), *(["--json"] if as_json else [])]
    assert accuracy.main(options) == 4
    captured = capsys.readouterr()
    assert captured.out.startswith("{" if as_json else "| model |")
    (line,) = captured.err.splitlines()
    assert f"{tmp_path / 'folder'}: cannot be written" in line
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_the_rivals_come_first_by_name(capsys, rivals):
    options = [
        "--rivals",
        str(rivals),
        "--only",
        "nf4",
        "--samples",
        "2",
        "--seqlen",
        "32",
        "--json",
    ]
    assert accuracy.main(options) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["rival"]) for one in document["scores"]] == [
        ("a", True),
        ("b", True),
        ("nf4", False),
    ]
    ours = document["scores"][2]
    assert ours["kl_mean"] == document["scores"][0]["kl_mean"]  # the same bytes
    assert "ratio" not in ours  # blocks are compared with no group size
    assert str(rivals) not in json.dumps(document)


def test_each_is_compared_with_the_best_rival_of_its_group_size():
    rivals = [
        score("x-128", 0.010, rival=True),
        score("y-128", 0.008, rival=True),
        score("x-32", 0.006, bits=4.5, group=32, rival=True),
        score("y-32", 0.007, bits=4.5, group=32, rival=True),
    ]
    mixed = {"int4 g128": 50, "int8 g128": 34}
    cases = [
        (score("ours-128", 0.004), "y-128"),
        (score("asymmetric", 0.004, bits=4.156), "y-128"),
        (score("ours-32", 0.003, bits=4.5, group=32), "x-32"),
        (score("ours-64", 0.003, bits=4.25, group=64), None),
        (score("auto", 0.003, bits=4.25, group=None, schemes=mixed), "x-32"),
        (score("auto-8", 0.003, bits=8.0, group=None, schemes=mixed), None),
        (score("nf4", 0.003, bits=4.127, group=None, schemes={"nf4 b64": 84}), None),
    ]
    for ours, name in cases:
        found = rival_to_beat(ours, [*rivals, ours])
        assert (found.name if found else None) == name, ours.name
    body = score_table([*rivals, *(ours for ours, _ in cases)])
    last = {cells(row)[0]: cells(row)[-1] for row in body.splitlines()[2:]}
    assert last["ours-128"] == "0.50"
    assert last["ours-32"] == "0.50"
    assert last["x-128"] == last["bf16"] == last["nf4"] == "-"


def test_a_ratio_has_its_paired_interval():
    rival = score("x-128", 0.010, rival=True, by_window=windows(0.010, 0))
    scores = [rival, score("ours-128", 0.005, by_window=windows(0.005, 1))]
    ratio = kl_ratio(scores[1], rival)
    assert 0.48 < ratio.interval.low < ratio.value < ratio.interval.high < 0.52
    cell = cells(score_table(scores).splitlines()[-1])[-1]
    assert re.fullmatch(r"0\.\d\d \(0\.\d\d to 0\.\d\d\)", cell)
    full = score("g128-full", 0.005, by_window=windows(0.005, 1))
    cell = cells(ablation_table([full]).splitlines()[-1])[-1]
    assert cell == "1.000 (1.000 to 1.000)"


def test_the_ablations_are_set_against_their_own_full_row():
    scores = [
        score("g128-full", 0.004),
        score("g128-plain", 0.008),
        score("g32-full", 0.002, group=32),
        score("g32-plain", 0.005, group=32),
    ]
    rows = ablation_table(scores).splitlines()[2:]
    assert [cells(row)[-1] for row in rows] == ["1.000", "2.000", "1.000", "2.500"]
    assert cells(ablation_table(scores[1:2]).splitlines()[2])[-1] == "-"


def test_every_ablation_differs_and_all_parts_make_the_whole():
    documents = [json.dumps(dataclasses.asdict(options)) for options in ablations().values()]
    assert len(set(documents)) == len(documents)
    options = PLAIN
    for part in PARTS:
        options = with_part_of(options, part, FULL)
    damped = dataclasses.replace(options.rounding, damping=FULL.rounding.damping)
    assert dataclasses.replace(options, rounding=damped) == FULL


def test_an_ablation_runs(capsys):
    options = "--ablations --only g32-plain --samples 2 --seqlen 32"
    assert accuracy.main(options.split()) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:3]
    assert cells(row)[:2] == ["g32-plain", "4.500"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--only gptq-g127", 2, "gptq-g127"),
        ("--ablations --only nf4", 2, "no such row"),
        ("--ablations --rivals nowhere", 2, "--rivals"),
        ("--samples 0", 2, "too little calibration"),
        ("--seqlen 4096 --samples 1", 2, "too short"),
        ("--out nowhere/record.json --only nf4", 2, "no such directory"),
        ("--rivals nowhere --only nf4", 3, "no checkpoints"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, options, code, words):
    assert accuracy.main(options.split()) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert words in line


def test_a_rival_that_is_not_quantized_is_refused(capsys, tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "dense")
    assert accuracy.main(["--rivals", str(tmp_path), "--only", "nf4"]) == 3
    assert "not quantized" in capsys.readouterr().err
