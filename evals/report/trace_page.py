"""A trace as a page: which experts are used, how many cover most uses, and what repeats.

Knows no policies.
"""

from qmix.evals.routing.expert_use import coverage, repeats, use_counts
from qmix.evals.routing.trace import Trace
from qmix.pages import charts
from qmix.pages.charts import Series
from qmix.pages.model_grids import Words, expert_picture
from qmix.pages.page import Page, Picture, Section, series_table
from qmix.printable import escaped


def use_picture(trace: Trace) -> Picture:
    """The shares of the experts by layer."""
    shares = [[100 * count / sum(layer) for count in layer] for layer in use_counts(trace)]
    every = [share for layer in shares for share in layer]
    even = 100 / trace.header.experts
    model = escaped(trace.header.model) or "a model without a name"
    words = Words(
        "use",
        "Expert use",
        f"Each expert's share of its layer's routes, from {min(every):.1f} % (no shade) to "
        f"{max(every):.1f} %; if all were used alike, each would have {even:.1f} %.",
        f"Shares of the experts of {model} by layer, {min(every):.1f} to {max(every):.1f} %.",
    )
    return expert_picture(words, shares, min(every), max(every))


def trace_page(trace: Trace, name: str) -> Page:
    """The page of a trace; `name` is its file's."""
    header = trace.header
    return Page(
        title=f"{header.model or name}: which experts a text goes through",
        lead=f"{len(trace.tokens):,} tokens through {header.layers} layers of {header.experts} "
        f"experts, {header.chosen} of them a token and layer.",
        facts=(("trace", name), ("model", header.model or "not named")),
        sections=(
            Section("Which experts", (), (use_picture(trace),)),
            Section(
                "How many experts, and how often again", (), (_coverage(trace), _repeats(trace))
            ),
        ),
    )


def _coverage(trace: Trace) -> Picture:
    shares = [100 * share for share in coverage(use_counts(trace))]
    experts = len(shares) - 1
    every = max(1, experts // 32)
    at = sorted({*range(0, experts + 1, every), experts})
    measured = Series("A", "this trace", 1, tuple(shares[n] for n in at))
    even = Series("B", "if all were used alike", 0, tuple(100 * n / experts for n in at))
    columns = [
        (line.key, ["" if value is None else f"{value:.2f}" for value in line.values])
        for line in (measured, even)
    ]
    half = next(n for n, share in enumerate(shares) if share >= 50)
    return Picture(
        "coverage",
        "Uses covered by the most used experts",
        "The hit rate of so many slots whose content never changes. A policy that follows the "
        "text may do better; qmix trace replay simulates one.",
        f"Half of all uses are of {half} of {experts} experts.",
        charts.lines(at, (measured, even), "experts held, the most used first", "uses, %"),
        (series_table("Uses covered, in %", "experts", list(map(str, at)), columns),),
    )


def _repeats(trace: Trace) -> Picture:
    shares = [None if share is None else 100 * share for share in repeats(trace)]
    chance = 100 * trace.header.chosen / trace.header.experts
    layers = list(range(trace.header.layers))
    measured = Series("A", "this trace", 1, tuple(shares))
    luck = Series("B", "by chance, if all were used alike", 0, (chance,) * len(layers))
    columns = [
        (line.key, ["-" if value is None else f"{value:.2f}" for value in line.values])
        for line in (measured, luck)
    ]
    return Picture(
        "repeats",
        "Experts that the token before used too",
        "By layer. Where the share is high, few experts have to move from token to token.",
        f"Repeated experts by layer; {chance:.1f} % would be chance. The table has the figures.",
        charts.lines(layers, (measured, luck), "layer", "repeated, %"),
        (series_table("Repeated, in %", "layer", list(map(str, layers)), columns),),
    )
