"""The installed transformers beside qmix, on the same random weights: gradients and generation.

The committed values (test_golden) are of single passes; whole generations, drawn ones too, and
gradients are compared here. Eager attention: it is the one whose window is right in all versions.
"""

import pytest
import torch

from qmix.models.causal_lm import MixtralForCausalLM
from tests.support.models import small_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        int(transformers.__version__.split(".")[0]) < 5, reason="made for transformers 5"
    ),
]
windows = pytest.mark.parametrize("window", [None, 5])


@pytest.fixture
def pair(tmp_path, window):
    """Theirs, and ours from the files that theirs wrote."""
    own = small_config(sliding_window=window, router_aux_loss_coef=0.02)
    config = transformers.MixtralConfig(**own.to_dict(), attn_implementation="eager")
    torch.manual_seed(3)
    theirs = transformers.MixtralForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    return theirs, MixtralForCausalLM.from_pretrained(tmp_path, device="cpu", dtype="float32")


def batch(rows=3, length=14):
    """Rows padded on the left by 9, 2 and 0."""
    ids = torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pads in zip(mask, (9, 2, 0), strict=True):
        row[:pads] = 0
    return ids, mask


@windows
def test_gradients_of_all_weights_are_those_of_transformers(pair):
    """Cross-entropy and balance together, without a row's first token, whose predictor is a pad."""
    theirs, ours = (model.train() for model in pair)
    ids, mask = batch()
    labels = ids.masked_fill(mask.cumsum(-1) < 2, -100)
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    losses = []
    for model in (theirs, ours):
        out = model(
            ids,
            attention_mask=mask,
            position_ids=places,
            labels=labels,
            output_router_logits=True,
        )
        out.loss.backward()
        losses.append(out.loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        key = name.replace(".block_sparse_moe.", ".mlp.")
        if ".experts." in key:  # theirs lie in one tensor, w1 above w3
            stem, _, rest = key.partition(".experts.")
            expert, which, _ = rest.split(".")
            joined = "down_proj" if which == "w2" else "gate_up_proj"
            gradient = expected[f"{stem}.experts.{joined}"][int(expert)]
            if which != "w2":
                gradient = gradient.chunk(2)[which == "w3"]
        else:
            gradient = expected[key]
        found = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
        assert (found - gradient).abs().max() < 1e-5, name


GREEDY = {"do_sample": False}
DRAWN = {"do_sample": True}
OPTIONS = [
    {**GREEDY, "max_new_tokens": 30},
    {**GREEDY, "max_new_tokens": 20, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    {**GREEDY, "max_new_tokens": 10, "bad_words_ids": [[5], [7, 9]], "eos_token_id": [4, 76]},
    {**DRAWN, "max_new_tokens": 15, "top_k": 9, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {**DRAWN, "max_new_tokens": 9, "num_return_sequences": 3},
]


@windows
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generations_are_those_of_transformers(pair, options):
    """Left-padded rows of three lengths; torch's own generator draws the same numbers for both."""
    ids, mask = batch()
    outs = []
    for model in pair:
        torch.manual_seed(5)
        outs.append(model.generate(ids, attention_mask=mask, pad_token_id=0, **options))
    assert torch.equal(*outs)


BEAMS = [
    {**GREEDY, "num_beams": 4, "max_new_tokens": 20},
    {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 9},
    {**DRAWN, "num_beams": 3, "max_new_tokens": 9},
]


@windows
@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beams_over_our_weights_are_those_over_theirs(pair, options):
    from qmix import hf

    theirs, ours = pair
    ids, mask = batch()
    outs = []
    for model in (theirs, hf.adapt(ours)):
        torch.manual_seed(5)
        outs.append(model.generate(ids, attention_mask=mask, pad_token_id=0, **options))
    assert torch.equal(*outs)
