"""HQQ's layout by names, shapes and settings, as hqq 0.2.8 and transformers' HqqConfig save it.

Every property of a quantized module is a tensor of its own, text and flags included. Knows nothing
of files, and reads no data.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qmix.errors import UnsupportedError
from qmix.formats.layouts.settings import PackedModule, Settings

W_Q = ".W_q"
SCALE = ".scale"
ZERO = ".zero"
NBITS = ".nbits"
GROUP_SIZE = ".group_size"
SHAPE = ".shape"
AXIS = ".axis"
PACKING = ".packing"
VIEW_AS_FLOAT = ".view_as_float"
CHANNEL_WISE = ".channel_wise"
UNPACK_DTYPE = ".unpack_view_dtype"
COMPUTE_DTYPE = ".compute_dtype"
QUANT_SCALE = ".quant_scale"
QUANT_ZERO = ".quant_zero"

_REQUIRED = (W_Q, SCALE, ZERO, NBITS, GROUP_SIZE, SHAPE, AXIS, PACKING)
# The last five say how the module was made or saved: they are not looked at.
_OPTIONAL = (
    *(VIEW_AS_FLOAT, CHANNEL_WISE, UNPACK_DTYPE, COMPUTE_DTYPE, QUANT_SCALE, QUANT_ZERO),
    *(".offload_meta", ".encoded_state_dict", ".stores_quant_config", ".optimize", ".round_zero"),
)
_TELLING = (W_Q, NBITS, PACKING)  # no other layout has any of these names

REMEDY = "Quantize again with hqq's axis=1, or with qmix quantize."

# The bits that hqq quantizes to -> the bits that hold them here. Codes of one bit take two.
READ_BITS: Mapping[float, int] = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3, 2: 2, 1.58: 2, 1: 2}
WORD_CODES = 10  # codes of 3 bits in a 32-bit word


def names(prefix: str, stored: Collection[str]) -> tuple[str, ...]:
    """The names of the tensors of module `prefix`'s weight; none if it is not HQQ's.

    Required names are among them even if the files lack them.
    """
    if not any(prefix + suffix in stored for suffix in _TELLING):
        return ()
    optional = [suffix for suffix in _OPTIONAL if prefix + suffix in stored]
    return tuple(prefix + suffix for suffix in (*_REQUIRED, *optional))


def held_bits(nbytes: int, dtype: str, count: int, groups: int) -> int | None:
    """Bits that a code takes in memory, from the bytes and dtype of W_q; None if nothing fits.

    Args:
        count: elements of the weight.
        groups: of the whole weight.
    """
    words = -(-groups // WORD_CODES) * (count // max(groups, 1))
    if dtype == "I32":
        return 3 if nbytes == 4 * words else None
    fitting = (held for each, held in ((1, 8), (2, 4), (4, 2), (8, 2)) if nbytes * each == count)
    return next(fitting, 3 if nbytes == 4 * words else None)


def check_axis(scale: Sequence[int], name: str, where: str) -> None:
    """Refuse groups along the outputs, which the shape of the scales tells.

    They scatter the outputs of a group over the weight: an input of an output has a scale that it
    shares with no input beside it, which neither kind of weight can hold without growing.

    Raises:
        UnsupportedError: the scales are one row, not one column.
    """
    if len(scale) == 2 and scale[0] == 1 < scale[1]:
        raise UnsupportedError(
            f"tensor {name}: groups along the outputs are not read",
            where=where,
            expected="[groups, 1] (axis 1)",
            found=list(scale),
            remedy=REMEDY,
        )


def read(document: Mapping[str, Any] | None, where: str) -> Settings:
    """The settings, which are HQQ's.

    Args:
        document: `quantization_config` of config.json, if there is one.
        where: the file, for errors.

    Raises:
        UnsupportedError: groups along the outputs.
        CheckpointError: the settings are not HQQ's, or a field is of a wrong type.
    """
    settings = Settings(document or {}, where)
    settings.check_method("hqq", "HQQ's")
    settings.strings("skip_modules")
    for params in _all_params(settings):
        if type(axis := params.get("axis", 1)) is not int or axis not in (0, 1):
            raise params.wrong("axis", "0 or 1")
        if axis == 0:
            raise params.unread("axis", "HQQ's groups along the outputs are not read", 1)
        bits = params.get("nbits", 4)
        if type(bits) not in (int, float) or bits not in READ_BITS:
            raise params.wrong("nbits", f"one of {', '.join(map(str, READ_BITS))}")
        size = params.get("group_size", 8)
        if type(size) is not int or size < 1:
            raise params.wrong("group_size", "a number of inputs, or null")
        params.flag("view_as_float")
    return settings


def _all_params(settings: Settings) -> list[Settings]:
    """The objects `weight_quant_params`: one for all modules, or one for each tag."""
    config = settings.inner("quant_config")
    if config is None:
        return []
    if (one := config.inner("weight_quant_params")) is not None:
        return [one]
    tagged = [inner for field in config.fields if (inner := config.inner(field)) is not None]
    return [params for inner in tagged if (params := inner.inner("weight_quant_params"))]


def _params_of(settings: Settings, module: PackedModule) -> Settings | None:
    """What the settings say of a module; None if they say nothing of any.

    Raises:
        CheckpointError: they name the modules that are quantized, and this is not among them.
    """
    config = settings.inner("quant_config")
    if config is None or not config.fields:
        return None
    if "weight_quant_params" in config.fields:
        return config.inner("weight_quant_params")
    tags = [_tag(name) for name in module.names]
    found = next((inner for tag in tags if (inner := config.inner(tag))), None)
    if found is None:
        keys = ", ".join(config.fields)
        raise settings.contradiction("quant_config", repr(tags[0]), module.name, keys)
    return found.inner("weight_quant_params")


def _tag(name: str) -> str:
    """A module's name as hqq's settings have it: without `model`, `layers` and numbers."""
    parts = name.split(".")
    return ".".join(x for x in parts if x not in ("model", "layers") and not x.isnumeric())


def confirm(
    settings: Settings, modules: Collection[PackedModule], _: Collection[Sequence[str]] = ()
) -> None:
    """Check the settings against the packed modules.

    Raises:
        CheckpointError: a field that the tensors contradict.
    """
    skipped = settings.strings("skip_modules")
    for module in modules:
        tags = {*map(_tag, module.names), *module.names}
        if named := next((name for name in skipped if name in tags), None):
            expected = f"no {named}"
            raise settings.contradiction("skip_modules", expected, module.name, named)
        params = _params_of(settings, module)
        if params is None:
            continue
        bits, columns = params.get("nbits"), module.shape[1]
        if bits is not None and READ_BITS[bits] != module.scheme.bits:
            raise params.contradiction("nbits", module.scheme.bits, module.name)
        size = params.get("group_size", columns)
        if size * module.groups != columns:
            raise params.contradiction("group_size", columns // module.groups, module.name)
