"""The part of a calibrated run that a process does which another one leads.

It waits for what the first process tells it, and does its share. Knows nothing of what is shared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qmix.processes.group import Group
from qmix.quantize.calibrated.layer_work import EXPECTED
from qmix.quantize.calibrated.loss_gradients import LossGradients
from qmix.quantize.calibrated.options import CalibratedOptions
from qmix.quantize.calibrated.run_files import RunFiles
from qmix.quantize.calibrated.windows import Calibration
from qmix.quantize.output_checkpoint import plan_outputs
from qmix.quantize.source import Source
from qmix.weights.scheme import Recipe
from qmix.work_meter import WorkMeter


@dataclass(frozen=True)
class Start:
    """What the first process tells when its checks are over. `folder` is where its files are."""

    folder: Path
    recipe: Recipe
    calibration: Calibration


def follow_quantize(
    open_source: Callable[[], Source], options: CalibratedOptions, group: Group
) -> None:
    """Do this process's share of a run, whose result the first process writes.

    Args:
        open_source: opens the source of the run; called when the first process has.

    Raises:
        CheckpointError: a weight or an activation is not finite.
        LostPeerError: another process was lost.
    """
    start: Start = group.told()
    source, meter = open_source(), WorkMeter(EXPECTED)
    outputs = plan_outputs(source, start.recipe, requantize=options.requantize)
    files = RunFiles(source, outputs, start.recipe, start.calibration, options, group)
    gradients = LossGradients(
        source, files.ids, options, start.folder, {}, lambda _: None, meter, group
    )
    steps: dict[str, Callable[[int], None]] = {
        "forward": gradients.follow_forward,
        "back": gradients.follow_back,
        "layer": lambda layer: files.follow_layer(start.folder, layer, meter),
    }
    while (told := group.told()) is not None:
        step, layer = told
        steps[step](layer)
