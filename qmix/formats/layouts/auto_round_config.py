"""AutoRound's settings: GPTQ's and AWQ's tensors under names of its own.

auto-round 0.16 writes `packing_format`, which says how zeros are stored, and `extra_config`, which
overrides the scheme of some modules (export/export_to_autoround/export.py, inference/
convert_model.py). Knows nothing of tensors.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qmix.errors import CheckpointError
from qmix.formats.layouts import gptq_config
from qmix.formats.layouts.gptq_config import GPTQConfig, Rule
from qmix.formats.layouts.settings import PackedModule, Settings
from qmix.formats.layouts.tensor_names import INTEGER_KINDS, Layout

METHODS = ("auto-round", "intel/auto-round")
_GPTQ_V1 = ("auto_round:auto_gptq", "auto_round:gptq", "auto")
_GPTQ_V2 = ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_COMPRESSED = "auto_round:llm_compressor"
_FLOATS = ("nv_fp", "nv_fp4", "nv_fp4_with_static_gs", "mx_fp", "mx_fp4", "mx_fp_rceil")
_ROTATIONS = ("rotation_config", "rotation_configs")
_FULL_BITS = 16  # from here on, a module is not quantized
_MAX_RULES = 1 << 16  # a rule for each matrix of a large model, and more
# What makes an expression of a key of `extra_config`; all other keys are whole names.
_EXPRESSION = re.compile(r"[*^$|()\[\]?+\\]")


def named(document: Mapping[str, Any] | None) -> bool:
    """Whether the settings are AutoRound's."""
    return document is not None and document.get("quant_method") in METHODS


def read(document: Mapping[str, Any], where: str, layout: Layout) -> GPTQConfig:
    """The settings, which must be those of a layout.

    Args:
        where: the file, for errors.
        layout: of the tensors: GPTQ, or AWQ.

    Raises:
        UnsupportedError: another packing, another number of bits, values that are no integers, or
            activations that are quantized or rotated.
        CheckpointError: a field of a wrong type, or another layout than that of the tensors.
    """
    settings = Settings(document, where)
    version = _version(settings, layout)
    _check_unread(settings)
    symmetric = settings.flag("sym")
    config = GPTQConfig(
        version=version,
        symmetric=True if symmetric is None else symmetric,
        bits=_bits(settings, layout),
        group_size=_group_size(settings),
        rules=_rules(settings, layout),
        where=where,
        settings=settings,
        auto_round=True,
    )
    config.matcher  # noqa: B018 - reads the expressions, so that a wrong one is refused here
    return config


def check_compressed(settings: Settings) -> None:
    """Check settings whose tensors are those of compressed-tensors, which tell the rest.

    Activations may be rounded there, which is not done here: their scales are checked, not used.

    Raises:
        UnsupportedError: another packing, or values that are not read in it.
        CheckpointError: a field of a wrong type.
    """
    if settings.get("packing_format", _COMPRESSED) != _COMPRESSED:
        what = "the tensors are compressed-tensors', but packing_format says otherwise"
        raise settings.unread("packing_format", what, repr(_COMPRESSED))
    if settings.get("data_type", _FLOATS[0]) not in _FLOATS:
        what = "only NVFP4 and MXFP4 are read in this packing"
        raise settings.unread("data_type", what, ", ".join(_FLOATS))
    if settings.get("bits", 4) != 4:
        raise settings.unread("bits", "FP4 has 4 bits", 4)
    for field in _ROTATIONS:
        if settings.get(field):
            raise settings.unread(field, f"{field} is not read", "none")


def confirm(
    config: GPTQConfig, modules: Collection[PackedModule], dense: Collection[Sequence[str]] = ()
) -> None:
    """Check the settings against the packed modules.

    Raises:
        CheckpointError: a field that the tensors contradict.
    """
    gptq_config.confirm(config, modules, dense)
    assert config.settings is not None
    blocks = _blocks(config.settings)
    for module in modules:
        said = config.for_module(module.name)
        in_blocks = not blocks or any(name.startswith(blocks) for name in module.names)
        if not in_blocks and said.rule is None:
            expected = f"a block around {module.name}, or its name in extra_config"
            raise config.settings.contradiction("block_name_to_quantize", expected, module.name)


def _version(settings: Settings, layout: Layout) -> int:
    """How GPTQ's zeros are stored: 1 if minus one."""
    packing = settings.get("packing_format", _GPTQ_V1[0])
    packed: dict[Layout, tuple[str, ...]] = {"GPTQ": (*_GPTQ_V1, *_GPTQ_V2), "AWQ": _AWQ}
    if packing not in (*_GPTQ_V1, *_GPTQ_V2, *_AWQ):
        known = ", ".join((_GPTQ_V2[0], _GPTQ_V1[0], _AWQ[0]))
        raise settings.unread("packing_format", f"no packing of {layout}'s tensors is read", known)
    if packing not in packed[layout]:
        raise CheckpointError(
            f"the tensors are {layout}'s, but packing_format says otherwise",
            where=settings.where,
            expected=" or ".join(packed[layout]),
            found=repr(packing),
            remedy="The settings are another checkpoint's: fetch them again with the tensors.",
        )
    return 1 if packing in _GPTQ_V1 else 2


def _check_unread(settings: Settings) -> None:
    """Refuse what changes the values or the inputs in ways that are not read."""
    if settings.get("data_type", "int") != "int":
        raise settings.unread("data_type", "only integers are read in this packing", "'int'")
    activations = settings.get("act_bits", _FULL_BITS)
    if type(activations) is not int or activations < _FULL_BITS:
        raise settings.unread("act_bits", "quantized activations are not read", "16 or none")
    for field in ("super_bits", "super_group_size", *_ROTATIONS):
        if settings.get(field):
            raise settings.unread(field, f"{field} is not read", "none")


def _bits(settings: Settings, layout: Layout) -> int:
    bits = settings.get("bits", 4)
    read = "4" if layout == "AWQ" else gptq_config.READ_BITS
    if type(bits) is not int or (bits not in INTEGER_KINDS if layout == "GPTQ" else bits != 4):
        raise settings.unread("bits", f"{layout} is read in {read} bits only", read)
    return bits


def _group_size(settings: Settings) -> int | None:
    where = settings.place("group_size")
    return gptq_config.checked_group_size(settings.get("group_size"), where)


def _blocks(settings: Settings) -> tuple[str, ...]:
    """The starts of the names of what is quantized; empty if the settings do not say."""
    given = settings.get("block_name_to_quantize", settings.get("to_quant_block_names"))
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(","))
    flat: list[str] = []
    for item in given if isinstance(given, list) else []:
        flat += item if isinstance(item, list) else [item]
    if not all(isinstance(name, str) and name for name in flat):
        raise settings.wrong("block_name_to_quantize", "names of blocks")
    return tuple(flat)


def _rules(settings: Settings, layout: Layout) -> tuple[Rule, ...]:
    """The overrides of modules: whole names first, as they precede expressions there."""
    extra = settings.inner("extra_config")
    if extra is None:
        return ()
    if len(extra.fields) > _MAX_RULES:
        raise settings.wrong("extra_config", f"at most {_MAX_RULES} modules")
    names = [key for key in extra.fields if not _EXPRESSION.search(key)]
    expressions = [key for key in extra.fields if _EXPRESSION.search(key)]
    rules = (_rule(extra, key, layout) for key in (*names, *expressions))
    return tuple(rule for rule in rules if rule is not None)


def _rule(extra: Settings, key: str, layout: Layout) -> Rule | None:
    """The rule of one key; None if it overrides nothing."""
    fields = extra.inner(key)
    if fields is None or not fields.fields:
        return None
    bits = fields.get("bits")
    if bits is not None and (type(bits) is not int or bits < 1):
        raise fields.wrong("bits", "a number of bits")
    excluded = bits is not None and bits >= _FULL_BITS
    if not excluded:
        _check_unread(fields)
        if bits is not None:
            _bits(fields, layout)
    return Rule(
        text=_from_the_start(key),
        excluded=excluded,
        bits=None if excluded else bits,
        group_size=None if excluded else _group_size(fields),
        symmetric=fields.flag("sym"),
    )


def _from_the_start(key: str) -> str:
    """An expression that matches from a name's start what AutoRound finds anywhere in it."""
    if not _EXPRESSION.search(key):
        return re.escape(key) + "$"
    return key if key.startswith((".*", "^")) else f".*(?:{key})"
