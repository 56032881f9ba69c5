"""Two models on the same windows, computed a second time in the plainest way."""

import math

import pytest
import torch

from qmix.evals.quality.token_scores import Divergences, TokenScores
from qmix.evals.quality.window_scores import difference, window_scores

WINDOWS, TOKENS = 12, 5


def scores(loss, kl=None, seed=0):
    """Of 12 windows of 5 tokens; the second window has one more."""
    counts = torch.full((WINDOWS,), TOKENS)
    counts[1] += 1
    window = torch.repeat_interleave(torch.arange(WINDOWS), counts)
    noise = torch.rand(len(window), generator=torch.Generator().manual_seed(seed))
    compared = None
    if kl is not None:
        compared = Divergences(torch.full_like(noise, 2.0), kl + 0.01 * noise, noise > 0.5)
    position = torch.arange(len(window))
    return TokenScores(window, position, loss + 0.1 * noise, noise > 0.5, compared)


def test_sums_are_by_window():
    given = scores(3.0, 0.02)
    found = window_scores(given)
    assert [each.tokens for each in found] == [5, 6, *[5] * 10]
    for index, each in enumerate(found):
        inside = given.window == index
        assert each.loss == pytest.approx(float(given.losses[inside].sum()), rel=1e-6)
        assert each.reference_loss == pytest.approx(2.0 * each.tokens)
        assert each.kl == pytest.approx(float(given.divergences.kl[inside].sum()), rel=1e-6)
    assert window_scores(scores(3.0))[0].kl is None


def test_a_difference_is_of_means_over_all_tokens():
    model, other = scores(3.0, 0.02, seed=1), scores(2.9, 0.04, seed=2)
    found = difference(window_scores(model), window_scores(other))
    ours, theirs = (float(each.losses.double().mean()) for each in (model, other))
    assert found.windows == WINDOWS
    assert found.perplexity.value == pytest.approx(math.exp(ours) - math.exp(theirs), rel=1e-6)
    assert found.perplexity_ratio.value == pytest.approx(math.exp(ours - theirs), rel=1e-6)
    kl = [float(each.divergences.kl.double().mean()) for each in (model, other)]
    assert found.kl.value == pytest.approx(kl[0] - kl[1], rel=1e-5)
    assert found.kl_ratio.value == pytest.approx(kl[0] / kl[1], rel=1e-5)
    for each in (found.perplexity, found.perplexity_ratio, found.kl, found.kl_ratio):
        assert each.interval.low < each.value < each.interval.high
    assert found.kl.interval.high < 0 < found.perplexity.interval.low


def test_a_model_differs_from_itself_by_nothing():
    same = window_scores(scores(3.0, 0.02))
    found = difference(same, same)
    assert (found.perplexity.value, found.perplexity.interval.low) == (0, 0)
    assert (found.kl_ratio.value, found.kl_ratio.interval.high) == (1, 1)


def test_without_a_reference_there_is_no_kl_and_of_none_no_ratio():
    bare = difference(window_scores(scores(3.0)), window_scores(scores(2.9)))
    assert bare.kl is bare.kl_ratio is None
    exact = scores(2.0, 0.0)
    exact.divergences.kl.zero_()
    found = difference(window_scores(scores(3.0, 0.02)), window_scores(exact))
    assert found.kl.value > 0
    assert found.kl_ratio is None
