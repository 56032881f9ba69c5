"""What each window adds to a score, and how two models differ on the same windows.

Shape letters: U windows. Knows nothing of tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qmix.evals.quality.bootstrap import Estimate, estimate
from qmix.evals.quality.token_scores import TokenScores


@dataclass(frozen=True, kw_only=True)
class WindowScore:
    """Sums over the scored tokens of a window, in nats.

    Attributes:
        reference_loss, kl: None without a reference.
    """

    tokens: int
    loss: float
    reference_loss: float | None
    kl: float | None


def window_scores(scores: TokenScores) -> tuple[WindowScore, ...]:
    """The sums of every window with scored tokens, in order."""
    counts = torch.bincount(scores.window)
    some = counts > 0

    def summed(values: Tensor) -> list[float]:
        sums: list[float] = torch.bincount(scores.window, values.double())[some].tolist()
        return sums

    other = scores.divergences
    nothing = [None] * int(some.sum())
    columns = (
        counts[some].tolist(),
        summed(scores.losses),
        nothing if other is None else summed(other.reference_losses),
        nothing if other is None else summed(other.kl),
    )
    return tuple(
        WindowScore(tokens=tokens, loss=loss, reference_loss=reference_loss, kl=kl)
        for tokens, loss, reference_loss, kl in zip(*columns, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How a model differs from another on the same windows.

    Attributes:
        perplexity: of the model, less that of the other.
        perplexity_ratio: of the model, over that of the other.
        kl: mean KL from the common reference in nats, less that of the other; None without one.
        kl_ratio: the same over that of the other; None if that is 0 too.
        windows: units of the intervals.
    """

    perplexity: Estimate
    perplexity_ratio: Estimate
    kl: Estimate | None
    kl_ratio: Estimate | None
    windows: int

    def to_dict(self) -> dict[str, Any]:
        """The figures as a JSON document."""
        return asdict(self)


def difference(model: Sequence[WindowScore], other: Sequence[WindowScore]) -> Difference:
    """A model less another that was scored on the same tokens, and with the same reference."""
    assert [each.tokens for each in model] == [each.tokens for each in other]
    sums = _table([[each.tokens, each.loss] for each in model], [[each.loss] for each in other])
    kl = kl_ratio = None
    if all(each.kl is not None for each in (*model, *other)):
        compared = _table(
            [[each.tokens, each.kl or 0.0] for each in model], [[each.kl or 0.0] for each in other]
        )
        kl = estimate(compared, lambda total: (total[..., 1] - total[..., 2]) / total[..., 0])
        if sum(each.kl or 0.0 for each in other):
            kl_ratio = estimate(compared, lambda total: total[..., 1] / total[..., 2])
    return Difference(
        perplexity=estimate(sums, _perplexity_difference),
        perplexity_ratio=estimate(sums, perplexity_ratio),
        kl=kl,
        kl_ratio=kl_ratio,
        windows=len(model),
    )


def perplexity_ratio(total: Tensor) -> Tensor:
    """Of sums (..., 3): tokens, a model's loss, another's."""
    return ((total[..., 1] - total[..., 2]) / total[..., 0]).exp()


def _perplexity_difference(total: Tensor) -> Tensor:
    tokens = total[..., 0]
    return (total[..., 1] / tokens).exp() - (total[..., 2] / tokens).exp()


def _table(*columns: Sequence[Sequence[float]]) -> Tensor:
    """Columns beside each other, float64 (U, C)."""
    return torch.cat([torch.tensor(each, dtype=torch.float64) for each in columns], 1)
