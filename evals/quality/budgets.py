"""How well the loss by which `auto` spends bits predicts the divergence that is measured.

`auto` adds up what each group of weights costs alone, rounded to nearest (`sensitivity`). GPTQ then
rounds better than that, so the measured divergence is lower. The allocation is right as long as it
is lower by one factor at every budget. Knows nothing of pictures.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmix.errors import UsageError
from qmix.evals import markdown
from qmix.evals.quality.scores import SCORE_COLUMNS, VariantScore, score_each
from qmix.evals.quality.texts import Text
from qmix.quantize.calibrated.bit_allocation import (
    Choices,
    QuantGroup,
    allocate_bits,
    choices_for,
    loss_of,
)
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.run import quantize_calibrated
from qmix.quantize.calibrated.sensitivity import Sensitivity
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.source import open_source

LEAST_BUDGETS = 3  # two always lie on a line


@dataclass(frozen=True, kw_only=True)
class BudgetScore:
    """`auto` at one budget.

    Attributes:
        budget: bits a weight.
        predicted: the sum of the groups' losses, in nats a token.
        score: of the quantized model; its mean KL is what was predicted.
    """

    budget: float
    predicted: float
    score: VariantScore

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.score.kl / self.predicted


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`measured = factor * predicted ** exponent`, by least squares of the logarithms.

    Attributes:
        correlation: of the logarithms (Pearson).
    """

    correlation: float
    exponent: float
    factor: float

    def __str__(self) -> str:
        return (
            f"measured = {self.factor:.3g} * predicted ** {self.exponent:.3f}; "
            f"correlation of the logarithms {self.correlation:.4f}"
        )


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuse what cannot be measured.

    Raises:
        UsageError: too few different budgets, or one out of range.
    """
    for bits in budgets:
        choices_for(bits)
    if len(set(budgets)) < max(LEAST_BUDGETS, len(budgets)):
        raise UsageError(
            "too few, or one twice",
            where="--budgets",
            expected=f"{LEAST_BUDGETS} or more different ones",
            found=" ".join(f"{bits:g}" for bits in budgets),
        )


def score_budgets(
    budgets: Sequence[float],
    source: Path,
    calibration: Calibration,
    text: Text,
    *,
    say: Callable[[str], None],
) -> list[BudgetScore]:
    """Quantize and score at each budget as `auto` does, with one measurement for equal choices."""
    opened, host = open_source(source), torch.device("cpu")
    measured: dict[Choices, list[QuantGroup]] = {}
    predicted = {}
    with tempfile.TemporaryDirectory() as scratch:
        written = {f"auto-{bits:g}": Path(scratch) / f"auto-{bits:g}" for bits in budgets}
        for bits, (name, out) in zip(budgets, written.items(), strict=True):
            choices = choices_for(bits)
            if choices not in measured:
                say(f"{name}: measuring the groups")
                measured[choices] = Sensitivity(
                    opened, calibration.ids, choices, attention=True, device=host
                ).groups()
            recipe = allocate_bits(measured[choices], bits)
            predicted[name] = loss_of(measured[choices], recipe)
            say(f"{name}: quantizing; predicted KL {predicted[name]:.5f}")
            options = CalibratedOptions(device=host)
            quantize_calibrated(opened, out, recipe, calibration, options, method="auto")
        say("scoring")
        scores = score_each(written, text, source, rival=False)  # the source is run once
    return [
        BudgetScore(budget=bits, predicted=predicted[each.name], score=each)
        for bits, each in zip(budgets, scores, strict=True)
    ]


def fit(scores: Sequence[BudgetScore]) -> Fit:
    """How the measured divergences follow the predicted ones."""
    x = [math.log(each.predicted) for each in scores]
    y = [math.log(each.score.kl) for each in scores]
    line = statistics.linear_regression(x, y)
    return Fit(
        correlation=statistics.correlation(x, y),
        exponent=line.slope,
        factor=math.exp(line.intercept),
    )


def budget_table(scores: Sequence[BudgetScore]) -> str:
    """The scores as a markdown table, with the predicted KL beside the measured one."""
    rows = [(*each.score.cells(), f"{each.predicted:.5f}", f"{each.ratio:.3f}") for each in scores]
    return markdown.table((*SCORE_COLUMNS, "predicted KL", "measured over it"), rows)


def budget_documents(scores: Sequence[BudgetScore]) -> list[dict[str, Any]]:
    """Budgets, predictions and what was measured, as JSON documents."""
    return [
        {"budget": each.budget, "predicted_kl": each.predicted, "measured_kl": each.score.kl}
        for each in scores
    ]
