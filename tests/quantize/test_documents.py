"""The model card and the page that `qmix quantize` writes beside the weights."""

import hashlib
import json

import pytest
import yaml

from qmix.commands.checkpoint.verify import verify
from qmix.errors import UsageError
from qmix.formats.files import manifest, output_dir
from qmix.pages.page import html
from qmix.quantize.methods import QuantizeRequest, quantize_checkpoint
from qmix.quantize.model_card import PAGE, model_card
from qmix.quantize.report import QuantizeReport, TensorResult
from qmix.quantize.report_page import report_page
from qmix.quantize.source_card import License
from qmix.weights.scheme import DENSE, NF4, Scheme
from tests.support.models import quantized, write_dense

SHA = hashlib.sha256(b"text").hexdigest()


def tensor(name, scheme=NF4, **facts):
    kind = "expert" if "experts" in name else "attention" if "attn" in name else "head"
    defaults = {"squared_error": 0.0 if scheme == DENSE else 1.0, "squared_norm": 100.0}
    return TensorResult(
        name=name,
        kind=kind,
        scheme=scheme,
        parameters=4096,
        bytes_out=2200,
        seconds=0.1,
        **{**defaults, **facts},
    )


def report(*tensors, method="nf4"):
    return QuantizeReport(method=method, tensors=tensors, bytes_in=90_000, seconds=12.5)


def calibrated():
    """Two layers of two experts, in two schemes, one of them rounded to nearest."""
    four, eight = (Scheme(kind=f"int{bits}", group_size=128) for bits in (4, 8))
    names = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{w}.weight"
        for layer in (0, 1)
        for expert in (0, 1)
        for w in (1, 2, 3)
    ]
    results = [
        tensor(name, four, tokens=100 + at, output_error=0.02 * at) for at, name in enumerate(names)
    ]
    results[3] = tensor(names[3], eight, tokens=5, fallback="too <few> tokens")
    return report(tensor("lm_head.weight", DENSE), *results, method="auto")


def front_matter(card):
    head, _, _ = card.removeprefix("---\n").partition("\n---\n")
    return yaml.safe_load(head)


def test_the_card_of_a_hub_s_model_is_of_hugging_face_s_form():
    facts = {
        "calibration": {"text_sha256": SHA, "samples": 256, "seqlen": 2048},
        "adapter": {"name": "my-lora", "sha256": SHA},
    }
    license = License("other", "my: license", "https://example.org/'#")
    card = model_card(
        "out", "mistralai/Mixtral-8x7B-v0.1@abc1234", calibrated(), facts, license, "9"
    )
    assert front_matter(card) == {
        "base_model": "mistralai/Mixtral-8x7B-v0.1",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "my: license",
        "license_link": "https://example.org/'#",
        "pipeline_tag": "text-generation",
        "tags": ["mixtral", "moe", "qmix", "quantized", "auto"],
    }
    for words in (
        f"256 windows of 2,048 tokens from a text of SHA-256 `{SHA}`",
        "| expert | int4 g128 | 11 |",
        "qmix eval out --data TEXT --reference mistralai/Mixtral-8x7B-v0.1",
        "qmix chat out",
        "with the LoRA `my-lora` merged, in ",
        "Made by qmix 9",
        f"]({PAGE})",
    ):
        assert words in card


@pytest.mark.parametrize(
    "name", ["a`b``c", "<script>x</script>", "x\n---\nlicense: mit", "a b; rm"]
)
def test_a_hostile_name_stays_a_name(name):
    card = model_card(name, name, report(tensor("lm_head.weight", DENSE)), {}, None, "9")
    assert set(front_matter(card)) == {"pipeline_tag", "tags"}
    assert "\nlicense: mit" not in card
    assert "qmix chat DIR" in card
    title = next(line for line in card.splitlines() if line.startswith("# `"))
    fence = title[2 : 2 + len(title[2:]) - len(title[2:].lstrip("`"))]
    assert title.count(fence) == 2  # nothing in the name ends the code


def test_the_page_shows_errors_bits_tokens_and_exceptions():
    text = html(report_page(calibrated(), "out <b>", "SRC", "9")).decode()
    for words in (
        *("Error of the weights by layer", "Error of the outputs by layer", "Bits a weight"),
        *("Calibration tokens by expert", "out &lt;b&gt;: SRC", "too &lt;few&gt; tokens"),
    ):
        assert words in text
    assert "12.5" not in text  # no times: the same run writes the same bytes


def test_the_page_of_plain_rounding_has_no_empty_sections():
    page = report_page(report(tensor("model.layers.0.self_attn.q_proj.weight")), "o", "s", "9")
    assert [section.title for section in page.sections] == ["Tensors by kind", "Errors by layer"]
    page = report_page(report(tensor("lm_head.weight", DENSE)), "o", "s", "9")
    assert [section.title for section in page.sections] == ["Tensors by kind"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    source = write_dense(folder / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    for name in ("one", "two"):
        (folder / name).mkdir()
        request = QuantizeRequest(method="nf4", documents=True)
        quantize_checkpoint(source, folder / name / "out", request, None)
    return folder


def test_both_are_listed_and_the_same_in_every_run(written):
    one, two = written / "one" / "out", written / "two" / "out"
    listed = json.loads((one / manifest.MANIFEST).read_text())["files"]
    for name in (manifest.CARD, PAGE):
        assert listed[name]["sha256"] == hashlib.sha256((one / name).read_bytes()).hexdigest()
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert front_matter((one / manifest.CARD).read_text())["license"] == "mit"


def test_a_card_may_be_edited_and_a_page_not(written):
    out = written / "two" / "out"
    (out / manifest.CARD).write_text("my own words")
    assert verify(out).problems == ()
    (out / PAGE).write_text("damaged")
    assert [problem.where for problem in verify(out).problems] == [str(out / PAGE)]
    output_dir.check_paths(written / "source", out, force=True)  # both are still qmix's to replace


def test_a_card_that_qmix_did_not_write_is_not_replaced(written, tmp_path):
    out = quantized(written / "source", tmp_path / "out")
    (out / manifest.CARD).write_text("the user's")
    with pytest.raises(UsageError, match="did not write"):
        output_dir.check_paths(written / "source", out, force=True)


def test_what_a_killed_run_left_is_taken_away(written, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    for name in (manifest.MARKER, manifest.CARD, PAGE, f"{PAGE}.0123abcd.writing"):
        (left / name).touch()
    with output_dir.partial(tmp_path / "out") as folder:
        assert [path.name for path in folder.iterdir()] == [manifest.MARKER]
