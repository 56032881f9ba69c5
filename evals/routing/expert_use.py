"""What a trace says of its experts: how often each is used, how many cover most, what repeats.

Shape letters: L layers, E experts. Knows no policies and no pages.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from qmix.evals.routing.trace import Trace


def use_counts(trace: Trace) -> list[list[int]]:
    """How many tokens went through each expert, L x E."""
    counts = [[0] * trace.header.experts for _ in range(trace.header.layers)]
    # A route that many tokens take is counted once: a tenth of the time.
    for layer, row in enumerate(counts):
        for route, tokens in Counter(token[layer] for token in trace.tokens).items():
            for expert in route:
                row[expert] += tokens
    return counts


def coverage(counts: Sequence[Sequence[int]]) -> list[float]:
    """The share of all uses that the n most used experts have, for n from 0 to L * E.

    It is the hit rate of the best n slots whose content never changes.
    """
    ordered = sorted((count for layer in counts for count in layer), reverse=True)
    total, so_far, shares = sum(ordered), 0, [0.0]
    for count in ordered:
        so_far += count
        shares.append(so_far / total)
    return shares


def repeats(trace: Trace) -> list[float | None]:
    """For each layer, the share of a token's experts that the token before it went through too.

    None for a trace of one token.
    """
    shares: list[float | None] = []
    for layer in range(trace.header.layers):
        routes = [set(token[layer]) for token in trace.tokens]
        pairs = list(pairwise(routes))
        same = sum(len(before & after) for before, after in pairs)
        shares.append(same / (len(pairs) * trace.header.chosen) if pairs else None)
    return shares
