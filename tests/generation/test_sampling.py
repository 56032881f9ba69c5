import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import QmixError, UsageError
from qmix.generation.sampling import Sampling


def logits(*values):
    return torch.tensor([values], dtype=torch.float32)


def kept(scores):
    return torch.isfinite(scores[0]).nonzero()[:, 0].tolist()


def test_greedy_takes_the_first_maximum_and_ignores_filters():
    sampling = Sampling(temperature=0, top_k=1, top_p=0.1)
    assert sampling.choose(sampling.warped(logits(1, 5, 5, 2)), None).tolist() == [1]


def test_top_k_keeps_k_tokens():
    assert kept(Sampling(temperature=1, top_k=2).warped(logits(1, 4, 3, 2))) == [1, 2]
    assert kept(Sampling(temperature=1, top_k=9).warped(logits(1, 4, 3, 2))) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    values = logits(*(math.log(p) for p in (0.5, 0.3, 0.15, 0.05)))
    assert kept(Sampling(temperature=1, top_p=0.5).warped(values)) == [0]
    assert kept(Sampling(temperature=1, top_p=0.51).warped(values)) == [0, 1]
    assert kept(Sampling(temperature=1, top_p=0.94).warped(values)) == [0, 1, 2]
    assert kept(Sampling(temperature=1, top_p=0.0).warped(values)) == [0]


def test_min_p_drops_what_is_too_unlikely_beside_the_best():
    values = logits(*(math.log(p) for p in (0.5, 0.3, 0.15, 0.05)))
    assert kept(Sampling(temperature=1, min_p=0.31).warped(values)) == [0, 1]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    input_ids = torch.tensor([[0, 0, 1]])
    scores = Sampling(repetition_penalty=2.0).penalised(logits(4, -4, 4, -4), input_ids)
    assert scores.tolist() == [[2, -8, 4, -4]]
    attention_mask = torch.tensor([[False, False, True]])
    scores = Sampling(repetition_penalty=2.0).penalised(
        logits(4, -4, 4, -4), input_ids, attention_mask
    )
    assert scores.tolist() == [[4, -8, 4, -4]]


def test_temperature_divides():
    scores = Sampling(temperature=0.5).warped(logits(1, 2))
    assert scores.tolist() == [[2, 4]]


def test_draws_follow_the_distribution_and_the_seed():
    sampling = Sampling(temperature=1.0)
    scores = sampling.warped(logits(*(math.log(p) for p in (0.7, 0.2, 0.1))))
    draw = [int(sampling.choose(scores, g)) for g in [torch.Generator().manual_seed(3)] * 3000]
    share = [draw.count(i) / 3000 for i in range(3)]
    assert all(abs(s - p) < 0.04 for s, p in zip(share, (0.7, 0.2, 0.1), strict=True))
    first = sampling.choose(scores, torch.Generator().manual_seed(5))
    assert torch.equal(first, sampling.choose(scores, torch.Generator().manual_seed(5)))


@given(
    values=st.lists(st.floats(-30, 30), min_size=2, max_size=40),
    temperature=st.floats(0.01, 10),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
)
def test_the_most_likely_token_always_stays(values, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    row = torch.tensor([values])
    scores = sampling.warped(row)
    best = row[0].max()
    assert any(row[0, i] == best for i in kept(scores))
    chosen = int(sampling.choose(scores, torch.Generator().manual_seed(0)))
    assert chosen in kept(scores)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("top_p", math.nan),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_non_finite_logits_stop_the_sampler(bad, temperature):
    sampling = Sampling(temperature=temperature)
    with pytest.raises(QmixError, match="non-finite"):
        sampling.choose(sampling.warped(logits(1, bad, 0)), None)


def test_a_tiny_temperature_is_greedy_and_not_nan():
    sampling = Sampling(temperature=1e-30)
    scores = sampling.warped(logits(1, 2))
    assert int(sampling.choose(scores, torch.Generator().manual_seed(0))) == 1


@pytest.mark.parametrize("shape", [(1, 7), (3, 2048)])
def test_a_draw_is_torchs_multinomial(shape):
    """The same numbers from the same generator: seeds keep their texts."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(20):
        drawn = Sampling(temperature=1.0).sample(scores, ours)
        meant = torch.multinomial(scores.softmax(-1), 1, generator=theirs)[:, 0]
        assert torch.equal(drawn, meant)
