"""The chart of `auto`'s predicted and measured divergence over the bits. Measures nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qmix.evals.quality.budgets import BudgetScore, fit
from qmix.pages import charts
from qmix.pages.charts import Series

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALT = "Mean KL of auto over bits a weight: predicted, measured, and predicted by the fit"


def budget_chart(scores: Sequence[BudgetScore]) -> "Figure":
    """Predicted and measured mean KL over the bits, and what the fit makes of the predictions."""
    ordered = sorted(scores, key=lambda each: each.score.bits_per_weight)
    line = fit(ordered)
    fitted = tuple(line.factor * each.predicted**line.exponent for each in ordered)
    series = (
        Series("p", "predicted", 0, tuple(each.predicted for each in ordered)),
        Series("m", "measured", 1, tuple(each.score.kl for each in ordered)),
        Series("f", "fitted", 2, fitted),
    )
    bits = [each.score.bits_per_weight for each in ordered]
    return charts.lines(bits, series, "bits a weight", "mean KL, nats a token")
