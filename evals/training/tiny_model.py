"""Where the tiny trained Mixtral is. It ships with a checkout, not with the wheel.

Knows nothing of what is in it.
"""

from pathlib import Path

from qmix.errors import CheckpointError

TINY = Path(__file__).resolve().parents[1] / "tiny"


def directory() -> Path:
    """The tiny model's checkpoint directory.

    Raises:
        CheckpointError: qmix is installed from a wheel, which leaves the weights out.
    """
    if not (TINY / "config.json").is_file():
        raise CheckpointError(
            "the tiny model is not here",
            where=str(TINY),
            remedy="It ships with the source checkout, not with the wheel: clone the repository.",
        )
    return TINY
