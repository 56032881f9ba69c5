"""lm_eval through qmix beside lm_eval through transformers, on the same weights in float32."""

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm-eval]'")

import transformers
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from qmix.evals.harness.language_model import QmixLM
from tests.support.lm_eval_tasks import evaluated, flat, request
from tests.support.models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and datasets' own

# Contexts of several lengths, one that is empty, and continuations of one id and of many.
PAIRS = [
    ("Return the", " number of items"),
    ("", "Return the number"),
    ("Raise a", " ValueError"),
    ("if the list is empty, return", " None"),
    ("if the list is empty, return", " zero"),
    ("A long context. " * 40, "It ends."),
]


@pytest.fixture(scope="module")
def ours():
    return QmixLM(str(TINY), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def theirs():
    # AutoTokenizer of transformers 5 adds no space before the text of a tokenizer.model.
    tokenizer = transformers.LlamaTokenizer.from_pretrained(TINY)
    options = {"dtype": "float32", "device": "cpu", "batch_size": 4}
    return HFLM(str(TINY), tokenizer=tokenizer, **options)


def loglikelihoods(model):
    return model.loglikelihood([request("loglikelihood", *pair) for pair in PAIRS], True)


def test_tasks_score_as_through_transformers(ours, theirs):
    found, documents = evaluated(ours)
    expected, theirs_documents = evaluated(theirs)
    assert found.keys() == expected.keys()
    assert {"qmix_choice acc,none", "qmix_words word_perplexity,none"} <= found.keys()
    assert found == pytest.approx(expected, rel=1e-4)
    assert flat(documents["qmix_choice"]) == pytest.approx(
        flat(theirs_documents["qmix_choice"]), abs=1e-4, rel=1e-5
    )
    assert flat(documents["qmix_words"]) == pytest.approx(
        flat(theirs_documents["qmix_words"]), rel=1e-4
    )


def test_begin_tokens_are_those_of_transformers(ours, theirs):
    assert ours.prefix_token_id == theirs.prefix_token_id == 1
    for text in ("Return the number.", "<s>Return", "a\n\nb"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, False) == theirs.tok_encode(text, False)
    assert flat(loglikelihoods(ours)) == pytest.approx(flat(loglikelihoods(theirs)), abs=1e-4)


def test_without_begin_tokens_too(theirs, ours):
    for model in (ours, theirs):
        model.add_bos_token = False
    try:
        assert ours.tok_encode("Return") == theirs.tok_encode("Return")
        assert flat(loglikelihoods(ours)) == pytest.approx(flat(loglikelihoods(theirs)), abs=1e-4)
    finally:
        for model in (ours, theirs):
            model.add_bos_token = None


def test_a_text_longer_than_the_window_rolls(ours, theirs):
    for model in (ours, theirs):
        model._max_length = 32
    try:
        requests = [request("loglikelihood_rolling", "Return a list of the names. " * 12)]
        found, expected = (model.loglikelihood_rolling(requests, True) for model in (ours, theirs))
        assert found == pytest.approx(expected, abs=1e-4)
    finally:
        for model in (ours, theirs):
            model._max_length = None


def test_texts_are_generated_alike_whatever_the_batch(ours, theirs):
    asked = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = [request("generate_until", text, asked) for text, _ in PAIRS if text]
    expected = theirs.generate_until(requests, True)
    assert ours.generate_until(requests, True) == expected
    ours.batch_size_per_gpu = 1
    try:
        assert ours.generate_until(requests, True) == expected
    finally:
        ours.batch_size_per_gpu = 4
    assert any(expected)


def test_lm_eval_knows_the_model_by_its_name(ours):
    assert get_model("qmix") is QmixLM
    info = ours.get_model_info()
    assert info["model_num_parameters"] > 6_000_000
    assert info["model_dtype"] == "torch.float32"
