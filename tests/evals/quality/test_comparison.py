"""A comparison's figures, each computed a second time in the plainest way."""

import pytest
import torch

from qmix.errors import CheckpointError
from qmix.evals.quality import comparison, evaluation
from qmix.evals.quality.texts import Text
from qmix.formats import open_checkpoint
from qmix.formats.names import place
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import quantized, write_dense

TEXT = Text.of("Return the item at the given index, or raise an error; see also list. " * 12)
WINDOW = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("compared")
    dense = write_dense(parent / "dense")
    return dense, quantized(dense, parent / "nf4")


@pytest.fixture(scope="module")
def run(folders):
    """The comparison, and what its progress was told."""
    shown = []
    result = comparison.compare(
        folders,
        TEXT,
        window=WINDOW,
        dtype="float32",
        device="cpu",
        progress=lambda *at: shown.append(at),
    )
    return result, shown


@pytest.fixture(scope="module")
def compared(run):
    return run[0]


def outputs(folder):
    """The runtime model's outputs on the windows of the text."""
    ids = LlamaTokenizer.from_pretrained(folder).encode(TEXT.content)
    ids = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    model = MixtralForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        return ids, model(ids, output_hidden_states=True, output_router_logits=True)


@pytest.fixture(scope="module")
def by_hand(folders):
    return [outputs(folder)[1] for folder in folders]


def test_the_scores_are_those_of_the_evaluation(folders, compared):
    expected = evaluation.evaluate(
        folders[1], TEXT, reference=folders[0], window=WINDOW, dtype="float32", device="cpu"
    )
    assert compared.models[1].score == expected
    assert compared.reference.score.reference is None
    assert compared.reference.distance is None
    assert compared.reference.score.perplexity == pytest.approx(expected.reference.perplexity)


def test_layer_errors_are_of_the_states_that_leave_a_layer(compared, by_hand):
    exact, rounded = (out.hidden_states for out in by_hand)
    for layer in (0, 1):  # the last entry of hidden_states is behind the final norm
        difference = (rounded[layer + 1] - exact[layer + 1]).norm(dim=-1)
        expected = (difference / exact[layer + 1].norm(dim=-1)).mean()
        found = compared.models[1].distance.layer_errors[layer]
        assert found == pytest.approx(float(expected), rel=1e-3)


def test_every_token_is_counted_at_its_experts(compared, by_hand):
    for model, out in zip(compared.models, by_hand, strict=True):
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(compared.chosen, -1).indices.flatten()
            assert list(model.expert_tokens[layer]) == torch.bincount(chosen, minlength=8).tolist()


def test_kl_by_position_averages_to_the_mean(compared):
    model = compared.models[1]
    bins = model.distance.positions
    assert [at.start for at in bins] == list(range(0, WINDOW, 4))
    weights = [
        at.stop - at.start - (at.start == 0) for at in bins
    ]  # a window's first is not scored
    mean = sum(w * at.kl for w, at in zip(weights, bins, strict=True)) / sum(weights)
    assert mean == pytest.approx(model.score.reference.kl_mean, rel=1e-5)


def test_weight_errors_are_those_of_the_decoded_weights(folders, compared):
    exact, rounded = map(open_checkpoint, folders)
    error = norm = 0.0
    for tensor in exact.tensors:
        if place(tensor.name).part == "w2":
            weight = exact.dense(tensor).double()
            error += float((weight - rounded.dense(tensor).double()).square().sum())
            norm += float(weight.square().sum())
    found = compared.models[1].distance.weight_errors
    assert found["w2"] == pytest.approx((error / norm) ** 0.5, rel=1e-4)
    assert set(found) == {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}


def test_the_worst_tokens_stand_in_their_text(folders, compared, by_hand):
    ids, _ = outputs(folders[0])
    log_probabilities = [out.logits.log_softmax(-1) for out in by_hand]
    kl = (log_probabilities[0].exp() * (log_probabilities[0] - log_probabilities[1])).sum(-1)[
        :, :-1
    ]
    worst = compared.models[1].distance.worst
    assert [token.kl for token in worst] == sorted((t.kl for t in worst), reverse=True)
    first = worst[0]
    assert first.kl == pytest.approx(float(kl.max()), rel=1e-3)
    window, position = divmod(int(kl.argmax()), WINDOW - 1)
    assert (first.window, first.position) == (window, position + 1)
    assert first.before + first.token + first.after in TEXT.content
    target = int(ids[window, position + 1])
    expected = float(log_probabilities[1][window, position, target].exp())
    assert first.model.probability == pytest.approx(expected, rel=1e-3)


def test_progress_counts_every_step_once(run):
    _, shown = run
    total = shown[0][2]
    assert [done for _, done, _ in shown] == list(range(total))


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 2}, {"num_local_experts": 4}])
def test_another_shape_is_refused_with_both_numbers(folders, tmp_path, changed):
    other = write_dense(tmp_path / "other", **changed)
    with pytest.raises(CheckpointError, match="not of the reference's shape"):
        comparison.compare([folders[0], other], TEXT, device="cpu")
