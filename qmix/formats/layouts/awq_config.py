"""AWQ's settings: what AutoAWQ and others write, checked against the tensors; and written.

Knows nothing of files.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qmix.formats.layouts.settings import (
    PackedModule,
    Settings,
    check_dense,
    check_head,
    check_packing,
)
from qmix.formats.layouts.tensor_names import without_lists

FILE = "quant_config.json"  # where AutoAWQ puts the settings, beside config.json

_BITS = ("bits", "w_bit")
_GROUP_SIZES = ("group_size", "q_group_size")
_DENSE = "modules_to_not_convert"
_VERSIONS = ("version", "format", "checkpoint_format")


def read(document: Mapping[str, Any] | None, where: str) -> Settings:
    """The settings, which are those of the AWQ that is read.

    Args:
        document: `quantization_config` of config.json, or FILE; None if there is neither.
        where: the file, for errors.

    Raises:
        UnsupportedError: another version than gemm, or not 4 bits.
        CheckpointError: the settings are not AWQ's, or a field is of a wrong type.
    """
    given = document or {}
    fields = {**without_lists(given), _DENSE: given.get(_DENSE)}
    settings = Settings(fields, where)
    settings.check_method("awq", "AWQ's")
    for field in _VERSIONS:
        version = settings.get(field, "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            what = f"AWQ in the {str(version)[:40]} version is not read"
            raise settings.unread(field, what, "gemm")
    for field in _BITS:
        if type(bits := settings.get(field, 4)) is not int or bits != 4:
            raise settings.unread(field, "AWQ is read in 4 bits only", 4)
    settings.flag("zero_point")
    check_packing(settings)
    return settings


def confirm(
    settings: Settings, modules: Collection[PackedModule], _: Collection[Sequence[str]] = ()
) -> None:
    """Check the settings against the packed modules.

    Raises:
        CheckpointError: a field that the tensors contradict.
    """
    check_head(settings, modules)
    check_dense(settings, _DENSE, modules)
    for field in _GROUP_SIZES:
        size = settings.get(field)
        if size is None:
            continue
        if type(size) is not int or not (size == -1 or size > 0):
            raise settings.wrong(field, "-1 or a number of inputs")
        for module in modules:
            columns = module.shape[1]
            if (columns if size == -1 else size) * module.groups != columns:
                raise settings.contradiction(field, columns // module.groups, module.name)


def quantization_config(group_size: int, dense: Sequence[str]) -> dict[str, object]:
    """The settings of a checkpoint, for config.json and for FILE, as AutoAWQ writes them.

    Args:
        group_size: of all packed weights; -1 is all inputs.
        dense: the modules that are not packed, by name or by the last part of their names.
    """
    return {
        "bits": 4,
        "group_size": group_size,
        "modules_to_not_convert": list(dense),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
