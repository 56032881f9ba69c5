"""Windows that several processes score together: which batches are whose, and all their scores.

Knows no models.
"""

from qmix.evals.quality.evaluation import Score
from qmix.evals.quality.token_scores import TokenScores
from qmix.evals.quality.windows import ScoringWindows
from qmix.evals.sharing.batches import apart, batches, chosen, flat, joined, unflat
from qmix.evals.sharing.score_folder import ScoreFolder
from qmix.processes.group import Group

# Batches between two that are kept: 64k tokens, for which each layer is read once.
_KEPT_TOGETHER = 16


def score_together(
    windows: ScoringWindows, score: Score, folder: ScoreFolder | None, group: Group
) -> tuple[TokenScores, ...]:
    """The scores of all windows, each batch computed by one process or read from the folder.

    Every process gets all of them.

    Args:
        score: scores some windows by each model.

    Raises:
        QmixError: a batch cannot be scored. The others of the group are ended by their launcher.
    """
    everything = batches(windows)
    done = {batch: None if folder is None else folder.read(batch) for batch in everything}
    mine = group.share([batch for batch, scores in done.items() if scores is None])
    computed: list[tuple[range, list[TokenScores]]] = []
    step = len(mine) if folder is None else _KEPT_TOGETHER
    for first in range(0, len(mine), step or 1):
        some = mine[first : first + step]
        models = [apart(each, some) for each in score(chosen(windows, some))]
        for batch, *scores in zip(some, *models, strict=True):
            if folder is not None:
                folder.write(batch, scores)
            computed.append((batch, scores))
    done |= dict(_gathered(computed, group))
    found = [scores for _, scores in sorted(done.items(), key=lambda item: item[0].start)]
    complete = [scores for scores in found if scores is not None]
    assert len(complete) == len(everything)
    return tuple(joined(parts) for parts in zip(*complete, strict=True))


def _gathered(
    computed: list[tuple[range, list[TokenScores]]], group: Group
) -> list[tuple[range, list[TokenScores]]]:
    """What all processes computed."""
    sent = [(batch, [flat(each) for each in scores]) for batch, scores in computed]
    found = group.gathered(sent)
    return [(batch, [unflat(each) for each in scores]) for batch, scores in found]
