"""Perplexity of a text under a stated protocol, and the divergence from a reference model.

Knows nothing of checkpoints and of printing.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qmix.errors import QmixError, QualityError
from qmix.evals.quality.bootstrap import Interval, estimate
from qmix.evals.quality.positions import PositionScore, position_scores
from qmix.evals.quality.token_scores import Divergences, TokenScores
from qmix.evals.quality.window_scores import WindowScore, perplexity_ratio, window_scores
from qmix.evals.quality.windows import ScoringWindows


@dataclass(frozen=True, kw_only=True)
class ReferenceScore:
    """The reference model's perplexity, and KL(reference || model) in nats a token.

    Attributes:
        top1_agreement: the fraction of positions at which both predict the same token.
        kl_interval: of the mean, by windows; None of too few windows.
        perplexity_ratio_interval: of the model's perplexity over the reference's, likewise.
    """

    perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    kl_interval: Interval | None = None
    perplexity_ratio_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The perplexity of a text.

    Attributes:
        stderr: exp(mean loss) times the standard error of the mean. It takes the tokens as
            independent, which they are not quite, so read it as a lower bound.
        tokens: number of tokens that were predicted.
        protocol: how the text was cut into windows, in words.
        positions: the scores by position in the window.
        windows: what each window adds, for comparisons with another model.
    """

    perplexity: float
    stderr: float
    tokens: int
    protocol: str
    text_sha256: str
    reference: ReferenceScore | None
    positions: tuple[PositionScore, ...] = ()
    windows: tuple[WindowScore, ...] = ()

    @classmethod
    def of(cls, scores: TokenScores, windows: ScoringWindows, text_sha256: str) -> "Perplexity":
        """The perplexity of scored tokens, and what they say of the reference.

        Raises:
            QmixError: the model computed numbers that are not finite.
        """
        perplexity, stderr = _perplexity(scores.losses)
        by_window = window_scores(scores)
        compared = None
        if scores.divergences is not None:
            compared = _reference_score(scores.divergences, by_window)
        return cls(
            perplexity=perplexity,
            stderr=stderr,
            tokens=len(scores.losses),
            protocol=windows.protocol,
            text_sha256=text_sha256,
            reference=compared,
            positions=position_scores(scores, windows.ids.shape[1]),
            windows=by_window,
        )

    def to_dict(self) -> dict[str, Any]:
        """The stable JSON document of `qmix eval --json`."""
        document: dict[str, Any] = {
            "perplexity": self.perplexity,
            "perplexity_stderr": self.stderr,
            "tokens": self.tokens,
            "protocol": self.protocol,
            "text_sha256": self.text_sha256,
        }
        if self.reference is not None:
            document["reference"] = asdict(self.reference)
        return document

    def gate(self, *, max_perplexity: float | None, max_kl: float | None) -> QualityError | None:
        """The bound that is exceeded, if any; None is no bound."""
        kl = self.reference.kl_mean if self.reference is not None else None
        for name, value, bound in (
            ("perplexity", self.perplexity, max_perplexity),
            ("mean KL divergence", kl, max_kl),
        ):
            if bound is not None and value is not None and not value <= bound:
                return QualityError(
                    f"the {name} is too high", expected=f"at most {bound}", found=f"{value:.6f}"
                )
        return None


def _reference_score(divergences: Divergences, windows: tuple[WindowScore, ...]) -> ReferenceScore:
    kl = divergences.kl.double()
    sums = torch.tensor(
        [[each.tokens, each.loss, each.reference_loss, each.kl] for each in windows],
        dtype=torch.float64,
    )
    return ReferenceScore(
        perplexity=_perplexity(divergences.reference_losses)[0],
        kl_mean=float(kl.mean()),
        kl_median=float(kl.median()),
        kl_p99=_quantile(kl, 0.99),
        top1_agreement=float(divergences.agreed.double().mean()),
        kl_interval=estimate(sums, lambda total: total[..., 3] / total[..., 0]).interval,
        perplexity_ratio_interval=estimate(sums, perplexity_ratio).interval,
    )


def _perplexity(losses: Tensor) -> tuple[float, float]:
    """exp of the mean loss, and its standard error."""
    losses = losses.double()
    mean = float(losses.mean())
    if not math.isfinite(mean):
        raise QmixError(
            "the model computed non-finite logits",
            remedy="The checkpoint is damaged or overflows in this dtype; try bfloat16.",
        )
    spread = float(losses.std()) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    try:
        return math.exp(mean), math.exp(mean) * spread
    except OverflowError:
        raise QmixError("the perplexity overflows", found=f"a mean loss of {mean:.1f}") from None


def _quantile(values: Tensor, fraction: float) -> float:
    """The smallest value that `fraction` of all do not exceed (torch.quantile stops at 16 M)."""
    return float(values.kthvalue(max(1, math.ceil(fraction * len(values)))).values)
