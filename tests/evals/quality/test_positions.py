"""Scores by position, through a sliding window, beside the runtime model."""

import shutil

import pytest
import torch

from qmix.evals.quality.evaluation import evaluate
from qmix.evals.quality.texts import Text
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model

TEXT = "Return the item at the given index, or raise an error; see also list. " * 40
WINDOW, SLIDING = 64, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sliding") / "model"
    vocabulary = len(LlamaTokenizer.from_pretrained(TINY))
    sizes = {"max_position_embeddings": WINDOW, "sliding_window": SLIDING}
    small_model(vocab_size=vocabulary, **sizes).save_pretrained(out)
    shutil.copy(TINY / "tokenizer.model", out)
    return out


def test_losses_by_position_are_those_of_the_model_with_its_sliding_window(folder):
    ids = LlamaTokenizer.from_pretrained(folder).encode(TEXT)
    rows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    model = MixtralForCausalLM.from_pretrained(folder, device="cpu")
    assert model.config.sliding_window == SLIDING
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    ).view(-1, WINDOW - 1)
    found = evaluate(folder, Text.of(TEXT)).positions
    assert [(at.start, at.stop) for at in found] == [(s, s + 4) for s in range(0, WINDOW, 4)]
    for at in found:
        expected = losses[:, max(at.start - 1, 0) : at.stop - 1].double().mean()
        assert at.loss == pytest.approx(float(expected), rel=1e-5)
        assert at.perplexity == pytest.approx(float(expected.exp()), rel=1e-5)
        assert at.kl is None


def test_the_first_position_is_never_scored(folder):
    short = evaluate(folder, Text.of("Return it."), reference=folder).positions
    assert [at.stop - at.start for at in short] == [1] * len(short)
    assert (short[0].loss, short[0].perplexity, short[0].kl) == (None, None, None)
    assert short[1].kl == 0
