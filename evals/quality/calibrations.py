"""A method calibrated several times, on texts that have no document in common, and its mean score.

How far the scores lie apart is what the choice of a calibration text is worth. Shape letters: C
calibrations. Knows nothing of how a checkpoint was quantized.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from qmix.evals.quality.perplexity import Perplexity, ReferenceScore
from qmix.evals.quality.scores import VariantScore
from qmix.evals.quality.window_scores import WindowScore


def averaged(name: str, scores: Sequence[VariantScore]) -> VariantScore:
    """C scores of one method as one, which has the mean loss and divergence of each window.

    Its intervals are of the windows, as those of every score; C checkpoints stand behind each.
    """
    results = [each.result for each in scores]
    windows = tuple(_mean_window(each) for each in zip(*(r.windows for r in results), strict=True))
    tokens = sum(window.tokens for window in windows)
    loss = math.fsum(window.loss for window in windows) / tokens
    return replace(
        scores[0],
        name=name,
        on_calibration=None,
        result=Perplexity(
            perplexity=math.exp(loss),
            stderr=fmean(result.stderr for result in results),
            tokens=results[0].tokens,
            protocol=results[0].protocol,
            text_sha256=results[0].text_sha256,
            reference=_mean_reference([each.reference for each in scores]),
            windows=windows,
        ),
    )


def _mean_window(windows: Sequence[WindowScore]) -> WindowScore:
    """One window's sums, of which C models have one each."""
    kls = [window.kl for window in windows if window.kl is not None]
    return replace(
        windows[0],
        loss=fmean(window.loss for window in windows),
        kl=fmean(kls) if kls else None,
    )


def _mean_reference(scores: Sequence[ReferenceScore]) -> ReferenceScore:
    """The mean of each figure; the intervals of single models are no intervals of a mean."""
    return ReferenceScore(
        perplexity=scores[0].perplexity,
        kl_mean=fmean(each.kl_mean for each in scores),
        kl_median=fmean(each.kl_median for each in scores),
        kl_p99=fmean(each.kl_p99 for each in scores),
        top1_agreement=fmean(each.top1_agreement for each in scores),
    )
