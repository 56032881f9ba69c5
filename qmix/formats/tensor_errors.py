"""The errors of files whose tensors are not those of the model that a config describes.

Knows no torch and reads nothing.
"""

from collections.abc import Sequence

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError
from qmix.quantities import counted

_MANY_TENSORS = 1000


def check_count(where: str, needed: int, found: int, *, description: str) -> None:
    """Refuse a config of absurd size before its tensors' names are made.

    Args:
        needed, found: tensors of the model, and of the files.
        description: the file that describes the model.

    Raises:
        CheckpointError: the files have far fewer tensors than the model.
    """
    if needed > found + _MANY_TENSORS:
        raise CheckpointError(
            f"not the tensors of the model that {description} describes",
            where=where,
            expected=f"at least {counted(needed, 'tensor')}",
            found=found,
            remedy=f"The download is incomplete, or {description} is another model's.",
        )


def wrong_tensors(
    where: str,
    config: MixtralConfig,
    missing: list[str],
    left_over: list[str],
    *,
    description: str,
) -> CheckpointError:
    """The error of files whose tensors are not those of the model; it names the first five.

    Args:
        description: the file that describes the model.
    """
    named = [f"missing {n}" for n in missing[:5]] + [f"left over {n}" for n in left_over[:5]]
    return CheckpointError(
        f"not the tensors of a Mixtral with {counted(config.num_hidden_layers, 'layer')} and "
        f"{counted(config.num_local_experts, 'expert')}: {len(missing)} missing, "
        f"{len(left_over)} left over",
        where=where,
        expected=f"each tensor of {description}'s model once",
        found="; ".join(named[:5]),
        remedy=f"The download is incomplete, or {description} is another model's.",
    )


def wrong_shape(
    where: str,
    name: str,
    expected: Sequence[object],
    found: Sequence[int],
    *,
    description: str = "config.json",
) -> CheckpointError:
    """The error of a tensor that has another shape than the model's.

    Args:
        description: the file that describes the model.
    """
    return CheckpointError(
        f"tensor {name}: wrong shape",
        where=where,
        expected=list(expected),
        found=list(found),
        remedy=f"{description} and the files do not belong together.",
    )
