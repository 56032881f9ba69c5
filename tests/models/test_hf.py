"""transformers drives a qmix model: its generate, its beams, its pipelines."""

import pytest
import torch

import qmix
from tests.support.models import TINY, ids, small_model
from tests.support.process import succeeds

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

from qmix import hf  # noqa: E402
from qmix.errors import UnsupportedError  # noqa: E402

GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module", params=["dense", "nf4"])
def loaded(request):
    folder = TINY if request.param == "dense" else request.getfixturevalue("tiny_nf4")
    return qmix.load(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("window", [None, 8])
def test_its_greedy_ids_are_ours(window):
    model = small_model(sliding_window=window)
    adapted = hf.adapt(model)
    out = adapted.generate(ids(12), max_new_tokens=20, **GREEDY)
    assert torch.equal(out, model.generate(ids(12), max_new_tokens=20))
    batch = ids(12, batch=2)
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    out = adapted.generate(batch, attention_mask=mask, max_new_tokens=20, **GREEDY)
    assert torch.equal(out, model.generate(batch, attention_mask=mask, max_new_tokens=20))


def test_its_beams_find_what_an_exhaustive_search_finds():
    model = small_model(vocab_size=12, num_hidden_layers=1)
    prompt = torch.tensor([[3, 5, 7]])
    out = hf.adapt(model).generate(prompt, max_new_tokens=3, num_beams=12, **GREEDY)
    best, found = -float("inf"), None
    for first in range(12):
        for second in range(12):
            row = torch.cat((prompt, torch.tensor([[first, second]])), 1)
            with torch.no_grad():
                scores = model(row).logits[0].log_softmax(-1)
            last = int(scores[4].argmax())
            total = float(scores[2, first] + scores[3, second] + scores[4, last])
            if total > best:
                best, found = total, [first, second, last]
    assert out[0, 3:].tolist() == found


@torch.no_grad()
def test_outputs_and_losses_are_ours():
    model = small_model()
    adapted = hf.adapt(model)
    out = adapted(ids(9), labels=ids(9), output_hidden_states=True, use_cache=True)
    ours = model(ids(9), labels=ids(9), output_hidden_states=True)
    assert torch.equal(out.logits, ours.logits)
    assert torch.equal(out.loss, ours.loss)
    assert all(
        torch.equal(a, b) for a, b in zip(out.hidden_states, ours.hidden_states, strict=True)
    )
    again = adapted(ids(3, seed=2), past_key_values=out.past_key_values)
    expected = model(torch.cat((ids(9), ids(3, seed=2)), 1)).logits[:, 9:]
    assert (again.logits - expected).abs().max() < 1e-5


def test_assisted_generation_gives_the_same_ids():
    model = small_model()
    adapted = hf.adapt(model)
    out = adapted.generate(ids(12), max_new_tokens=20, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(out, model.generate(ids(12), max_new_tokens=20))


def test_a_cache_of_fixed_size_is_refused():
    with pytest.raises(UnsupportedError, match="DynamicCache"):
        hf.adapt(small_model()).generate(
            ids(5), max_new_tokens=3, cache_implementation="static", **GREEDY
        )


def test_a_pipeline_writes_what_we_write(loaded):
    model, tokenizer = loaded
    pipe = transformers.pipeline(
        "text-generation", model=hf.adapt(model), tokenizer=hf.tokenizer(tokenizer), device="cpu"
    )
    out = pipe("Return the", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    assert out == "Return the" + "".join(model.stream("Return the", max_new_tokens=12))


def test_the_tokenizer_gives_the_same_ids_and_text(loaded):
    _, own = loaded
    theirs = hf.tokenizer(own)
    for text in ("My favourite", "  lead", "na\u00efve \U0001f680 x", "a\nb\t", "x"):
        found = theirs(text).input_ids
        assert found == own.encode(text)
        assert theirs.decode(found) == own.decode(found)
        assert theirs.decode(found, skip_special_tokens=True) == text
    batch = theirs(["a", "a b c"], padding=True, return_tensors="pt")
    assert batch.attention_mask[0].tolist()[0] == 0


def test_streamers_of_transformers_and_ours_are_interchangeable(loaded, capsys):
    model, tokenizer = loaded
    prompt = torch.tensor([tokenizer.encode("Return the")])
    theirs = transformers.TextStreamer(hf.tokenizer(tokenizer), skip_prompt=True)
    out = model.generate(prompt, max_new_tokens=12, streamer=theirs, eos_token_id=None)
    written = capsys.readouterr().out
    assert written.split() == tokenizer.decode(out[0, prompt.shape[1] :]).split()
    ours = qmix.TextStreamer(tokenizer, skip_prompt=True)
    hf.adapt(model).generate(prompt, max_new_tokens=12, streamer=ours, do_sample=False)
    assert capsys.readouterr().out.split()[:3] == written.split()[:3]


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_what_we_score(loaded):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    model, tokenizer = loaded
    harness = lm_eval.HFLM(
        hf.adapt(model), tokenizer=hf.tokenizer(tokenizer), device="cpu", batch_size=2
    )
    pairs = [("Return the length of", " the list."), ("If", " the file does not exist")]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for (context, rest), (found, _) in zip(pairs, harness.loglikelihood(asked), strict=True):
        row = torch.tensor([tokenizer.encode(context + rest)])
        start = len(tokenizer.encode(context))
        with torch.no_grad():
            scores = model(row).logits[0, start - 1 : -1].log_softmax(-1)
        own = float(scores.gather(1, row[0, start:, None]).sum())
        assert found == pytest.approx(own, abs=1e-4)


def test_without_transformers_the_remedy_is_named():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from qmix.errors import UnsupportedError\n"
        "try:\n    import qmix.hf\n"
        "except UnsupportedError as error:\n    sys.exit('pip install' not in str(error))\n"
        "sys.exit('imported')"
    )
    succeeds(code)


def test_nothing_else_imports_transformers():
    code = "import sys, qmix.models.auto, qmix.commands.session; sys.exit('transformers' in sys.modules)"
    succeeds(code)
