"""How well a model predicts by position in the window, which shows what a long context costs.

Knows nothing of texts and of pages.
"""

import math
from dataclasses import dataclass

from qmix.evals.quality.token_scores import TokenScores

_BINS = 16  # of the positions in a window


@dataclass(frozen=True, kw_only=True)
class PositionScore:
    """The scored tokens at positions [start, stop) of their windows.

    Attributes:
        loss: mean negative log-likelihood in nats; None: none was scored.
        kl: mean KL in nats; None without a reference too.
    """

    start: int
    stop: int
    loss: float | None
    kl: float | None

    @property
    def perplexity(self) -> float | None:
        """exp of the loss, infinite where it overflows."""
        if self.loss is None:
            return None
        return math.exp(self.loss) if self.loss < 700 else math.inf


def position_scores(scores: TokenScores, size: int) -> tuple[PositionScore, ...]:
    """The scores in at most 16 ranges of equal length.

    Args:
        size: positions of a window.
    """
    width = max(1, -(-size // _BINS))
    result = []
    for start in range(0, size, width):
        inside = (scores.position >= start) & (scores.position < start + width)
        some = bool(inside.any())
        loss = float(scores.losses[inside].double().mean()) if some else None
        kl = None
        if some and scores.divergences is not None:
            kl = float(scores.divergences.kl[inside].double().mean())
        stop = min(start + width, size)
        result.append(PositionScore(start=start, stop=stop, loss=loss, kl=kl))
    return tuple(result)
