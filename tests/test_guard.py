"""The guard passes on what stands and fails when the quantizer is broken."""

import dataclasses

import numpy as np
import pytest
import torch

from qmix import weights
from qmix.errors import QualityError
from qmix.evals import guard, measure
from qmix.evals.guard import Figures, check
from qmix.formats import bnb
from qmix.quantize import nf4


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return measure.compare(tmp_path_factory.mktemp("guard") / "tiny-nf4")


def test_the_guard_passes(comparison):
    guard.guard(comparison)


@pytest.fixture
def perturbed(monkeypatch):
    """One of the 16 values moved by a tenth, alike for encoder, writer and reader."""
    values = (*weights.NF4_VALUES[:9], weights.NF4_VALUES[9] + 0.1, *weights.NF4_VALUES[10:])
    for module in (weights, nf4, bnb):
        monkeypatch.setattr(module, "NF4_VALUES", values)
    nf4._bounds.cache_clear()
    yield
    nf4._bounds.cache_clear()


@pytest.mark.usefixtures("perturbed")
def test_the_guard_fails_when_the_code_table_is_perturbed(tmp_path):
    comparison = measure.compare(tmp_path / "broken")
    with pytest.raises(QualityError, match="nf4_kl_mean"):
        guard.guard(comparison)


def test_the_guard_fails_when_the_encoder_rounds_wrongly(tmp_path, monkeypatch):
    """Every value takes the next higher code where it lies just below the middle."""
    bounds = tuple(b - np.float32(0.02) for b in nf4._bounds())
    monkeypatch.setattr(nf4, "_bounds", lambda: bounds)
    comparison = measure.compare(tmp_path / "broken")
    with pytest.raises(QualityError, match="nf4_kl_mean"):
        guard.guard(comparison)


def test_every_figure_is_guarded_in_its_direction():
    base = Figures(
        bf16_perplexity=10.0,
        nf4_ratio=1.02,
        nf4_kl_mean=0.01,
        nf4_kl_p99=0.1,
        nf4_top1_agreement=0.95,
    )
    assert check(base, base, guard.SAME_TEXT) == ()
    worse = {
        "bf16_perplexity": 11.0,
        "nf4_ratio": 1.1,
        "nf4_kl_mean": 0.02,
        "nf4_kl_p99": 0.2,
        "nf4_top1_agreement": 0.9,
    }
    for name, value in worse.items():
        (failure,) = check(dataclasses.replace(base, **{name: value}), base, guard.SAME_TEXT)
        assert name in failure
    better = dataclasses.replace(base, nf4_kl_mean=0.001, nf4_top1_agreement=1.0, nf4_ratio=1.0)
    assert check(better, base, guard.SAME_TEXT) == ()
    (failure,) = check(dataclasses.replace(base, nf4_kl_mean=float("nan")), base, guard.SAME_TEXT)
    assert "nf4_kl_mean" in failure


def test_the_markdown_table_names_both_models(comparison):
    table = guard.markdown(comparison)
    assert table.count("\n") == 4
    assert "bf16" in table
    assert "NF4" in table


def test_scores_do_not_depend_on_the_number_of_threads(comparison, tiny, tiny_nf4):
    from qmix.evals.perplexity import Text, evaluate

    text = Text.of("Return a list of the names in the current scope. " * 30)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = evaluate(tiny_nf4, text, reference=tiny, device="cpu")
    finally:
        torch.set_num_threads(threads)
    two = evaluate(tiny_nf4, text, reference=tiny, device="cpu")
    assert one.perplexity == pytest.approx(two.perplexity, rel=1e-3)
