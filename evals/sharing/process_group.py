"""The processes that score together: which batches are whose, and how their scores come together.

accelerate's `PartialState`: started by `accelerate launch`, by torchrun, or by `launch`. Knows no
models.
"""

import os
from collections.abc import Sequence
from importlib.util import find_spec

from qmix.errors import UnsupportedError
from qmix.evals.quality.evaluation import Score
from qmix.evals.quality.token_scores import TokenScores
from qmix.evals.quality.windows import ScoringWindows
from qmix.evals.sharing.batches import apart, batches, chosen, flat, joined, unflat
from qmix.evals.sharing.score_folder import ScoreFolder

# Batches between two that are kept: 64k tokens, for which each layer is read once.
_KEPT_TOGETHER = 16


def processes() -> int:
    """How many processes this one is of; 1 if nobody started several."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def is_first() -> bool:
    """Whether this process prints."""
    return os.environ.get("RANK", "0") == "0"


def check_extra() -> None:
    """
    Raises:
        UnsupportedError: accelerate is missing.
    """
    if find_spec("accelerate") is None:
        raise UnsupportedError(
            "several processes need accelerate",
            remedy="Run: pip install 'qmix-runtime[scale]'",
        )


def score_together(
    windows: ScoringWindows, score: Score, folder: ScoreFolder | None
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
    left = [batch for batch, scores in done.items() if scores is None]
    computed: list[tuple[range, list[TokenScores]]] = []
    mine = _share(left)
    step = len(mine) if folder is None else _KEPT_TOGETHER
    for first in range(0, len(mine), step or 1):
        group = mine[first : first + step]
        models = [apart(each, group) for each in score(chosen(windows, group))]
        for batch, *scores in zip(group, *models, strict=True):
            if folder is not None:
                folder.write(batch, scores)
            computed.append((batch, scores))
    done |= dict(_gathered(computed))
    found = [scores for _, scores in sorted(done.items(), key=lambda item: item[0].start)]
    complete = [scores for scores in found if scores is not None]
    assert len(complete) == len(everything)
    return tuple(joined(parts) for parts in zip(*complete, strict=True))


def _share(left: Sequence[range]) -> list[range]:
    """This process's batches."""
    if processes() == 1:
        return list(left)
    from accelerate import PartialState

    with PartialState(cpu=not _on_gpu()).split_between_processes(list(left)) as mine:
        return list(mine)


def _gathered(
    computed: list[tuple[range, list[TokenScores]]],
) -> list[tuple[range, list[TokenScores]]]:
    """What all processes computed."""
    if processes() == 1:
        return computed
    from accelerate.utils import gather_object

    sent = [(batch, [flat(each) for each in scores]) for batch, scores in computed]
    return [(batch, [unflat(each) for each in scores]) for batch, scores in gather_object(sent)]


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
