"""Windows in batches, one pass of a model each, and the scores of batches as one.

A batch is computed alike wherever it is computed, so that scores do not depend on which process has
which batch, to the last bit. Shape letters: W windows, S window. Knows no process and no file.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from qmix.evals.quality.layer_streaming import windows_a_pass
from qmix.evals.quality.token_scores import Divergences, TokenScores
from qmix.evals.quality.windows import ScoringWindows


def batches(windows: ScoringWindows) -> list[range]:
    """The windows of each pass."""
    count, size = len(windows.ids), windows_a_pass(windows.ids.shape[1])
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def chosen(windows: ScoringWindows, rows: Sequence[range]) -> ScoringWindows:
    """Some batches, in order, as windows of their own."""
    index = torch.tensor([row for batch in rows for row in batch])
    return ScoringWindows(windows.ids[index], windows.scored[index], windows.protocol)


def apart(scores: TokenScores, rows: Sequence[range]) -> list[TokenScores]:
    """The scores of `chosen(windows, rows)` for each batch, counted as in all windows."""
    found, first = [], 0
    for batch in rows:
        inside = (scores.window >= first) & (scores.window < first + len(batch))
        part = _selected(scores, inside)
        found.append(_moved(part, batch.start - first))
        first += len(batch)
    return found


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """The scores of all batches, which come in order."""
    columns = zip(*(flat(part) for part in parts), strict=True)
    return unflat([torch.cat(column) for column in columns])


def flat(scores: TokenScores) -> list[Tensor]:
    """All columns: four, or seven with a reference."""
    columns = [scores.window, scores.position, scores.losses, scores.greedy]
    other = scores.divergences
    return (
        columns if other is None else [*columns, *(getattr(other, f.name) for f in fields(other))]
    )


def unflat(columns: Sequence[Tensor]) -> TokenScores:
    """The inverse of `flat`."""
    window, position, losses, greedy, *other = columns
    return TokenScores(window, position, losses, greedy, Divergences(*other) if other else None)


def _selected(scores: TokenScores, inside: Tensor) -> TokenScores:
    return unflat([column[inside] for column in flat(scores)])


def _moved(scores: TokenScores, by: int) -> TokenScores:
    window, *others = flat(scores)
    return unflat([window + by, *others])
