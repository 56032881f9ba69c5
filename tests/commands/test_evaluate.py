"""`qmix eval`: what it prints, and the options that contradict each other."""

import json

import pytest

from tests.support.models import ROOT
from tests.support.process import qmix

CHATS = ROOT / "evals" / "tasks" / "chats.jsonl"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    lines = (
        f"Line {number}: return a list of the names of {number} items.\n" for number in range(90)
    )
    path.write_text("".join(lines), encoding="utf-8")  # fmt: skip
    return path


def test_two_models_are_compared_on_the_same_windows(tiny, tiny_nf4, text):
    options = ("--data", text, "--ctx", "64", "--reference", tiny)
    result = qmix("eval", "--against", tiny, tiny_nf4, *options, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    less = document["difference"]
    assert less["kl"]["value"] == pytest.approx(document["reference"]["kl_mean"], rel=1e-5)
    assert less["kl"]["interval"]["low"] > 0
    assert less["kl_ratio"] is None  # over nothing
    assert less["perplexity"]["value"] == pytest.approx(
        document["perplexity"] - document["against"]["perplexity"], rel=1e-5
    )
    assert document["against"]["reference"]["kl_mean"] == 0
    interval = document["reference"]["kl_interval"]
    assert interval["low"] < document["reference"]["kl_mean"] < interval["high"]


def test_figures_stand_with_their_intervals_and_by_position(tiny, tiny_nf4, text):
    result = qmix(
        "eval", tiny_nf4, "--data", text, "--ctx", "64", "--by-position", "--against", tiny
    )
    assert result.returncode == 0, result.stderr  # fmt: skip
    assert "this model's less it" in result.stdout
    assert "95 %: " in result.stdout
    assert "paired bootstrap over" in result.stdout
    assert "60 to 63" in result.stdout


def test_too_few_windows_say_so(tiny, tiny_nf4, text):
    result = qmix("eval", tiny_nf4, "--data", text, "--reference", tiny)
    assert "none: " in result.stdout
    assert "95 %" not in result.stdout


def test_chats_are_scored_by_conversation(tiny, tiny_nf4):
    result = qmix("eval", tiny_nf4, "--chats", CHATS, "--reference", tiny)
    assert result.returncode == 0, result.stderr
    assert "12 conversations by the chat template" in result.stdout
    assert "paired bootstrap over 12 windows" in result.stdout


def test_needles_are_shown_by_depth(tiny, tiny_nf4, text):
    options = ("--data", text, "--needle", "1", "--ctx", "128", "--reference", tiny)
    result = qmix("eval", tiny_nf4, *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("of 1, -") == 22
    document = json.loads(qmix("eval", tiny_nf4, *options, "--json").stdout)
    assert [len(model["depths"]) for model in document["models"]] == [11, 11]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--data, --chats or --tasks"),
        (("--data", "x", "--chats", "x"), "--data and --chats"),
        (("--data", "x", "--template", "inst"), "--template needs --chats"),
        (("--chats", "x", "--needle", "1"), "--needle needs --data"),
        (("--chats", "x", "--stride", "4"), "no --stride"),
        (("--data", "x", "--needle", "1", "--stride", "4"), "no --stride"),
        (("--data", "x", "--needle", "1", "--by-position"), "--needle and --tasks take no"),
        (("--data", "x", "--max-kl", "1"), "--max-kl needs --reference"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else None,
)
def test_options_that_contradict_each_other_are_named(tiny, options, said):
    result = qmix("eval", tiny, *options)
    assert result.returncode == 2
    assert said in result.stderr
