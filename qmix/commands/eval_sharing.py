"""`qmix eval` in several processes, and its scores in a folder: the options, and what follows.

Heavy imports stay inside the functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qmix import __version__
from qmix.commands import options
from qmix.commands.processes import PANEL, Processes
from qmix.errors import UsageError

if TYPE_CHECKING:
    from qmix.evals.quality.evaluation import Score, Share
    from qmix.evals.quality.token_scores import TokenScores
    from qmix.evals.quality.windows import ScoringWindows


@dataclass(frozen=True)
class Sharing(options.Group):
    """Who scores what, as written."""

    processes: Processes = None
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep scores there as they come; the same command goes on with them.",
            show_default=False,
            rich_help_panel=PANEL,
        ),
    ] = None

    def check(self, shareable: bool) -> None:
        """
        Raises:
            UsageError: what is scored is not shared.
        """
        if not shareable and self != SHARING:
            raise UsageError("--needle and --tasks take no --processes and no --scores")


SHARING = Sharing()
KEPT = "Scores that --scores DIR kept are not computed again."  # of a run that was lost


def shared(kept: Path | None, models: Sequence[Path], computation: Sequence[object]) -> "Share":
    """How windows are shared among processes, and where scores are kept.

    Args:
        kept: the folder; None: nowhere.
        models: all of them, the reference last.
        computation: what decides how they are computed.
    """
    import torch

    from qmix.evals.sharing.score_folder import ScoreFolder, run_name
    from qmix.evals.sharing.score_together import score_together
    from qmix.processes.group import current

    def share(windows: "ScoringWindows", score: "Score") -> "tuple[TokenScores, ...]":
        folder = None
        if kept is not None:
            computed = (*computation, __version__, torch.__version__)
            folder = ScoreFolder(kept, run_name(models, windows, computed))
        return score_together(windows, score, folder, current())

    return share
