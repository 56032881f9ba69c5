"""`qmix compare` from its options to its page."""

import json

import pytest

from tests.support.models import quantized, write_dense
from tests.support.process import qmix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    quantized(write_dense(folder / "dense"), folder / "nf4")
    (folder / "text").write_text("Return the item at the given index, or raise an error. " * 8)
    return folder


def compare(folder, *arguments):
    return qmix("compare", *arguments, "--data", folder / "text", "--device", "cpu")


def test_a_page_is_written_and_named_and_not_replaced(folder):
    out = folder / "report.html"
    models = (folder / "nf4", "--reference", folder / "dense", "--ctx", 64, "--out", out)
    result = compare(folder, *models, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [model["name"] for model in document["models"]] == ["dense", "nf4"]
    assert document["models"][1]["reference"]["kl_mean"] > 0
    assert f"the page: {out}" in result.stderr.replace("\n", "")
    assert out.read_bytes().startswith(b"<!DOCTYPE html>")
    out.write_text("mine")
    assert compare(folder, *models).returncode == 2
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("nf4",), "2 to 8"),
        (("nf4", "nf4"), "a model is given twice"),
        (("nf4", "dense", "--out", "report.pdf"), "NAME.html"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(folder, arguments, found):
    paths = [folder / name if "-" not in name else name for name in arguments]
    result = compare(folder, "--out", folder / "other.html", *paths)
    assert result.returncode == 2
    assert found in result.stderr
    assert not (folder / "other.html").exists()
