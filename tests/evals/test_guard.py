"""The guard passes on what stands and fails when the quantizer is broken."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qmix import strict_json
from qmix.errors import QualityError
from qmix.evals import corpus, guard
from qmix.evals.guard import Figures, check
from qmix.evals.quality import measure
from qmix.evals.quality.bootstrap import Interval
from qmix.evals.quality.evaluation import evaluate
from qmix.evals.quality.perplexity import Perplexity, ReferenceScore
from qmix.evals.quality.texts import Text
from qmix.evals.quality.window_scores import WindowScore
from qmix.formats.layouts import bnb
from qmix.quantize.rounding.grid import Grid
from qmix.weights import nf4
from qmix.weights import table as weights
from tests.support.models import threads
from tests.support.soak import both, soaking


@pytest.fixture(scope="module")
def text():
    """An eighth of the held-out text, whose tolerance is the wider one; in a soak all of it."""
    with pytest.MonkeyPatch.context() as patch:
        whole = corpus.heldout_text()
        patch.setattr(
            corpus, "heldout_text", lambda: whole[: len(whole) // (1 if soaking() else 8)]
        )
        yield


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, text):
    return measure.compare_nf4(tmp_path_factory.mktemp("guard") / "tiny-nf4")


@pytest.fixture(scope="module")
def gptq_comparison(tmp_path_factory, text):
    return measure.compare_gptq(tmp_path_factory.mktemp("guard") / "tiny-gptq")


@pytest.mark.slow
@both
def test_the_guard_passes(soak, comparison, gptq_comparison):
    guard.guard(comparison, gptq_comparison)


@pytest.fixture
def perturbed(monkeypatch):
    """One of the 16 values moved by a tenth, alike for encoder, writer and reader."""
    values = (*weights.NF4_VALUES[:9], weights.NF4_VALUES[9] + 0.1, *weights.NF4_VALUES[10:])
    monkeypatch.setitem(weights.VALUES, "nf4", values)
    monkeypatch.setattr(bnb, "NF4_VALUES", values)
    nf4._midpoints.cache_clear()
    yield
    nf4._midpoints.cache_clear()


@pytest.mark.usefixtures("perturbed")
@pytest.mark.soak
def test_the_guard_fails_when_the_code_table_is_perturbed(tmp_path, gptq_comparison):
    broken = measure.compare_nf4(tmp_path / "broken")
    with pytest.raises(QualityError, match="nf4_kl_mean"):
        guard.guard(broken, gptq_comparison)


@pytest.mark.usefixtures("text")
@pytest.mark.slow
def test_the_guard_fails_when_the_encoder_rounds_wrongly(tmp_path, monkeypatch):
    """Every value takes the next higher code where it lies just below the middle.

    GPTQ's side of the comparison is not looked at here, and costs nothing.
    """
    bounds = tuple(b - np.float32(0.02) for b in nf4._midpoints("nf4"))
    monkeypatch.setattr(nf4, "_midpoints", lambda kind: bounds)
    broken = measure.compare_nf4(tmp_path / "broken")
    with pytest.raises(QualityError, match="nf4_kl_mean"):
        guard.guard(broken, broken)


@pytest.mark.soak
def test_the_guard_fails_when_the_solver_is_perturbed(tmp_path, monkeypatch, comparison):
    """Codes are rounded a fifth of a step too low."""

    def biased(grid, values):
        return torch.clamp((values / grid.scale - 0.2).round_(), grid.low, grid.high)

    monkeypatch.setattr(Grid, "nearest", biased)
    broken = measure.compare_gptq(tmp_path / "broken")
    with pytest.raises(QualityError, match="gptq_kl_mean"):
        guard.guard(comparison, broken)


@pytest.mark.slow
def test_other_texts_have_the_wider_tolerance(comparison, gptq_comparison):
    document = strict_json.read(guard.BASELINES)
    for other in ("text_sha256", "calibration_sha256"):
        text, calibration = (
            "0" * 64 if name == other else document[name]
            for name in ("text_sha256", "calibration_sha256")
        )
        result = dataclasses.replace(comparison.result, text_sha256=text)
        nf4_side = dataclasses.replace(comparison, result=result)
        gptq_side = dataclasses.replace(gptq_comparison, calibration_sha256=calibration)
        assert "wide" in guard.guard(nf4_side, gptq_side)


def test_every_figure_is_guarded_in_its_direction():
    base = Figures(
        bf16_perplexity=10.0,
        nf4_ratio=1.02,
        nf4_kl_mean=0.01,
        nf4_kl_p99=0.1,
        nf4_top1_agreement=0.95,
        gptq_ratio=1.01,
        gptq_kl_mean=0.008,
        gptq_kl_p99=0.09,
        gptq_top1_agreement=0.96,
    )
    assert check(base, base, guard.SAME_TEXT) == ()
    worse = {
        "bf16_perplexity": 11.0,
        "nf4_ratio": 1.1,
        "nf4_kl_mean": 0.02,
        "nf4_kl_p99": 0.2,
        "nf4_top1_agreement": 0.9,
        "gptq_ratio": 1.1,
        "gptq_kl_mean": 0.009,
        "gptq_kl_p99": 0.12,
        "gptq_top1_agreement": 0.9,
    }
    assert set(worse) == {field.name for field in dataclasses.fields(Figures)}
    for name, value in worse.items():
        (failure,) = check(dataclasses.replace(base, **{name: value}), base, guard.SAME_TEXT)
        assert name in failure
    better = dataclasses.replace(base, nf4_kl_mean=0.001, nf4_top1_agreement=1.0, nf4_ratio=1.0)
    assert check(better, base, guard.SAME_TEXT) == ()
    (failure,) = check(dataclasses.replace(base, nf4_kl_mean=float("nan")), base, guard.SAME_TEXT)
    assert "nf4_kl_mean" in failure


@pytest.mark.slow
def test_the_markdown_table_names_every_model(comparison, gptq_comparison):
    table = guard.comparison_table(comparison, gptq_comparison)
    assert table.count("\n") == 5
    for name in ("bf16", "NF4", "GPTQ"):
        assert name in table


def test_the_guard_says_what_the_windows_leave_open():
    """Two methods on twelve windows, one half as far from the reference as the other."""

    def compared(kl):
        windows = tuple(
            WindowScore(tokens=10, loss=30 + kl, reference_loss=30.0, kl=10 * kl * (1 + x / 100))
            for x in range(12)
        )
        reference = ReferenceScore(
            perplexity=20.0,
            kl_mean=kl,
            kl_median=kl,
            kl_p99=kl,
            top1_agreement=0.9,
            kl_interval=Interval(0.9 * kl, 1.1 * kl),
            perplexity_ratio_interval=Interval(1.001, 1.002),
        )
        result = Perplexity(
            perplexity=20.1,
            stderr=0.1,
            tokens=120,
            protocol="windows",
            text_sha256="0" * 64,
            reference=reference,
            windows=windows,
        )
        return SimpleNamespace(result=result)

    lines = guard.intervals(compared(0.02), compared(0.01)).splitlines()
    assert lines == [
        "NF4: mean KL 95 %: 0.01800 to 0.02200; perplexity over bf16's 95 %: 1.0010 to 1.0020",
        "GPTQ: mean KL 95 %: 0.00900 to 0.01100; perplexity over bf16's 95 %: 1.0010 to 1.0020",
        "GPTQ's KL over NF4's: 0.500 (95 %: 0.500 to 0.500)",
    ]


def test_scores_do_not_depend_on_the_number_of_threads(tiny, tiny_nf4):
    text = Text.of("Return a list of the names in the current scope. " * 30)
    with threads(1):
        one = evaluate(tiny_nf4, text, reference=tiny, device="cpu")
    with threads(2):
        two = evaluate(tiny_nf4, text, reference=tiny, device="cpu")
    assert one.perplexity == pytest.approx(two.perplexity, rel=1e-3)
