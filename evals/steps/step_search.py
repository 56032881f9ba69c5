"""The search for the fastest launches of a decode step, with every candidate that was tried.

What is found serves the steps after it; the user's file of tunings is neither read nor written.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

from qmix.evals.steps.setting import Setting
from qmix.generation.step_trials import Rounds, StepTrials
from qmix.generation.tuner import SECONDS
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.tuning import axes
from qmix.tuning.search import DeviceLostError, Search

_LAYERS = 4
_REHEARSED_SECONDS = 300.0  # the interpreter's pace is nobody's limit


def results(setting: Setting, weights: str, rows: int) -> Iterator[dict[str, object]]:
    """The best first, then each candidate, the fastest first, then those that were rejected."""
    rehearsed = setting.is_rehearsal
    model = setting.packed_model(weights, _LAYERS) if rehearsed else setting.model(weights)
    trials = StepTrials(
        model.model,
        model.lm_head,
        1 if rehearsed else rows,
        setting.clock,
        rounds=Rounds(1, 1) if rehearsed else Rounds(),
        record=not rehearsed,
    )
    tried = (_rehearsed_axis,) if rehearsed else axes.axes()
    seconds = _REHEARSED_SECONDS if rehearsed else SECONDS
    search = Search((UNTUNED, axes.SEPARATE), tried, trials, seconds=seconds, clock=time.monotonic)
    try:
        search.run()
    except DeviceLostError as error:
        what = axes.changes(list(search.rejected)[-1])
        raise RuntimeError(f"CUDA error: the device was lost with {what}") from error
    best: dict[str, object] = {"rows": rows, "best": axes.changes(search.best), "gain": search.gain}
    if search.best in search.outcomes:
        setting.tunings(weights).by_rows[rows] = search.best
    else:
        best["failed"] = f"nothing could be timed: {search.rejected[search.best]}"
    yield best
    order = sorted(search.outcomes.items(), key=lambda item: item[1].microseconds)
    for tuning, outcome in order:
        yield {
            "rows": rows,
            "tuning": axes.changes(tuning),
            "microseconds": outcome.microseconds,
            "difference": outcome.difference,
        }
    for tuning, why in search.rejected.items():
        yield {"rows": rows, "tuning": axes.changes(tuning), "rejected": why}


def _rehearsed_axis(tuning: StepTuning) -> list[StepTuning]:
    """One candidate: the interpreter takes seconds for a step."""
    return [replace(tuning, gate_up=replace(tuning.gate_up, warps=1))]
