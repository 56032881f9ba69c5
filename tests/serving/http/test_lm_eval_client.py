"""lm_eval's local-completions against a server: scores equal those of the model in this process."""

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[lm-eval]'")

from lm_eval.models.openai_completions import LocalCompletionsAPI

from qmix.evals.harness.language_model import QmixLM
from tests.support.http_server import serving
from tests.support.lm_eval_tasks import evaluated, flat, request
from tests.support.models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's and datasets' own


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def inside():
    # With the server's tokenizer, lm_eval sends no begin token.
    return QmixLM(str(TINY), dtype="float32", device="cpu", batch_size=4, add_bos_token=False)


def client(served, **options):
    """The model local-completions, which finds the tokenizer at the server."""
    return LocalCompletionsAPI(
        base_url=f"{served.url}/completions", model="tiny", max_length=256, **options
    )


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 8}, {"batch_size": 4, "num_concurrent": 3}], ids=str
)  # fmt: skip
def test_tasks_score_as_in_this_process(served, inside, options):
    over = client(served, **options)
    assert over.tokenizer_backend == "remote"
    found, documents = evaluated(over, limit=12)
    expected, inside_documents = evaluated(inside, limit=12)
    assert found == pytest.approx(expected, rel=1e-4)
    for task, each in documents.items():
        assert flat(each) == pytest.approx(flat(inside_documents[task]), rel=1e-4, abs=1e-4)


def test_texts_are_generated_as_in_this_process(served, inside):
    asked = {"until": ["\n\n"], "max_gen_toks": 10, "do_sample": False}
    requests = [request("generate_until", text, dict(asked)) for text in ("Return the", "if x is")]
    found = client(served, batch_size=2).generate_until(requests, True)
    expected = inside.generate_until(requests, True)
    assert [text.strip() for text in found] == [text.strip() for text in expected]


def test_the_server_says_what_its_tokenizer_is(served):
    status, document = served.get("/tokenizer_info")
    assert status == 200
    assert document["bos_token"] == "<s>"
    assert document["eos_token"] == "</s>"
    assert document["model_max_length"] == 256
