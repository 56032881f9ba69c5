"""Scores of a quantized version that nobody measured."""

from qmix.evals.quality.perplexity import Perplexity, ReferenceScore
from qmix.evals.quality.scores import VariantScore


def score(name, kl, *, bits=4.125, group=128, rival=False, schemes=None, by_window=()):
    reference = ReferenceScore(
        perplexity=20.0, kl_mean=kl, kl_median=kl, kl_p99=kl, top1_agreement=0.95
    )
    result = Perplexity(
        perplexity=20.5,
        stderr=0.1,
        tokens=100,
        protocol="one window",
        text_sha256="0" * 64,
        reference=reference,
        windows=by_window,
    )
    return VariantScore(
        name=name,
        bits_per_weight=bits,
        schemes=schemes or {f"int4 g{group}": 84},
        group_size=group,
        rival=rival,
        result=result,
    )
