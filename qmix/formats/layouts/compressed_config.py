"""compressed-tensors' settings, checked against the tensors: integers, NVFP4, MXFP4 and FP8.

They assign a scheme to each module by groups of targets, as version 0.20 reads them (quantization/
quant_args.py, quant_config.py, utils/match.py). Knows nothing of files.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qmix.formats.layouts import auto_round_config
from qmix.formats.layouts.fp8_blocks import fits_blocks
from qmix.formats.layouts.name_matcher import NameMatcher
from qmix.formats.layouts.settings import PackedModule, Settings
from qmix.weights.scheme import DENSE

_FORMAT = "pack-quantized"
_MIXED = "mixed-precision"  # each group names its own
_NVFP4 = "nvfp4-pack-quantized"
_MXFP4 = "mxfp4-pack-quantized"
_FP8 = ("float-quantized", "naive-quantized")
_FORMATS = (_FORMAT, _NVFP4, _MXFP4, *_FP8, _MIXED)
_STATUSES = ("initialized", "calibration", "frozen", "compressed")
_CLASS = "Linear"  # what a target names all linear layers by
_EXPRESSION = "re:"
# Values of `actorder`; only `group` scatters inputs over groups (true is an old spelling of it).
_SCATTERED = ("group", "dynamic", True)
_IN_ORDER = (None, "weight", "static", False)


@dataclass(frozen=True)
class Targets:
    """Names of modules, expressions over names, and the class, as they stand in a list."""

    items: tuple[str, ...]
    where: str

    @cached_property
    def _expressions(self) -> tuple[tuple[int, str], ...]:
        """The expressions with their indices among all items."""
        return tuple(
            (index, item) for index, item in enumerate(self.items) if item.startswith(_EXPRESSION)
        )

    @cached_property
    def matcher(self) -> NameMatcher:
        texts = ((item, item.removeprefix(_EXPRESSION)) for _, item in self._expressions)
        return NameMatcher(tuple(texts), self.where)

    def index(self, name: str) -> int | None:
        """The item that names a module: its name, else an expression, else the class."""
        if name in self.items:
            return self.items.index(name)
        found = self.matcher.first(name)
        if found is not None:
            return self._expressions[found][0]
        return self.items.index(_CLASS) if _CLASS in self.items else None


@dataclass(frozen=True)
class CompressedConfig:
    """The settings, read.

    Attributes:
        groups: each group's settings.
        owners: for each target, the index of its group.
        targets: of all groups, in their order.
        ignored: the modules that are not quantized.
    """

    settings: Settings
    groups: tuple[Settings, ...]
    owners: tuple[int, ...]
    targets: Targets
    ignored: Targets

    def confirm(self, modules: Collection[PackedModule], dense: Collection[Sequence[str]]) -> None:
        """Check the settings against the packed modules.

        Args:
            dense: the dense modules, each by its name in the files and its other spellings; without
                routers, which are no linear layers in transformers 5.

        Raises:
            CheckpointError: a field that the tensors contradict.
            UnsupportedError: activations that are rounded too.
        """
        for names in dense:
            targeted = self.targets.index(names[0]) is not None
            if targeted and all(self.ignored.index(name) is None for name in names):
                raise self.settings.contradiction("ignore", f"{names[0]} among them", names[0])
        for module in modules:
            ignored = self.ignored.index(module.name)
            if ignored is not None:
                found = self.ignored.items[ignored]
                expected = f"nothing that matches {module.name}"
                raise self.settings.contradiction("ignore", expected, module.name, found)
            if self.settings.get("config_groups") is None:
                continue
            indices = (self.targets.index(name) for name in module.names)
            index = next((index for index in indices if index is not None), None)
            if index is None:
                if not self.groups:
                    expected = f"a group for {module.name}"
                    raise self.settings.contradiction("config_groups", expected, module.name)
                expected = f"a target that matches {module.name}"
                raise self.groups[0].contradiction("targets", expected, module.name)
            _confirm_group(self.groups[self.owners[index]], module, self.settings)


def read(document: Mapping[str, Any] | None, where: str) -> CompressedConfig:
    """The settings, which are those of the compressed-tensors format that is read.

    Args:
        document: config.json's `quantization_config`; None if there is none.
        where: the file, for errors.

    Raises:
        UnsupportedError: a format that is not read, transforms, or sparse weights.
        CheckpointError: the settings are not those of compressed-tensors, or a field is of a wrong
            type.
    """
    if document is not None and auto_round_config.named(document):
        auto_round_config.check_compressed(Settings(document, where))
        document = None  # the rest is AutoRound's own
    settings = Settings(document if document is not None else {}, where)
    if document is not None:
        if "quant_method" not in document:
            raise settings.wrong("quant_method", "'compressed-tensors'")
        settings.check_method("compressed-tensors", "compressed-tensors'")
        layout = document.get("format", _FORMAT)
        if layout not in _FORMATS:
            what = f"compressed-tensors in the {str(layout)[:40]} format is not read"
            raise settings.unread("format", what, f"one of {', '.join(_FORMATS)}")
    if settings.get("quantization_status", "compressed") not in _STATUSES:
        raise settings.wrong("quantization_status", "'compressed'")
    _check_additions(settings)
    groups = settings.inner("config_groups")
    read_groups: list[Settings] = []
    targets: list[str] = []
    owners: list[int] = []
    for name in groups.fields if groups else ():
        assert groups is not None
        group = groups.inner(name)
        if group is None:
            raise groups.wrong(name, "an object")
        group_targets = group.strings("targets")
        owners += [len(read_groups)] * len(group_targets)
        targets += group_targets
        read_groups.append(group)
    config = CompressedConfig(
        settings,
        tuple(read_groups),
        tuple(owners),
        Targets(tuple(targets), settings.place("config_groups: targets")),
        Targets(settings.strings("ignore"), settings.place("ignore")),
    )
    for listed in (config.targets, config.ignored):
        listed.matcher  # noqa: B018 - reads the expressions, so that a wrong one is refused here
    return config


def _check_additions(settings: Settings) -> None:
    """Refuse what is computed beside the packed weights."""
    transforms = settings.inner("transform_config")
    if transforms is not None and transforms.fields not in ({}, {"config_groups": {}}):
        what = "transforms of weights or activations are not computed"
        raise settings.unread("transform_config", what, "null")
    sparsity = settings.inner("sparsity_config")
    if sparsity is not None and sparsity.get("format", "dense") != "dense":
        raise sparsity.unread("format", "sparse weights are not read", "'dense'")
    settings.inner("kv_cache_scheme")  # says how a cache may be rounded; qmix does not round it


def _confirm_group(group: Settings, module: PackedModule, settings: Settings) -> None:
    formats = _formats(module)
    if formats == (_FORMAT,):  # in the others they say how activations may be rounded
        for field in ("input_activations", "output_activations"):
            if group.get(field) is not None:
                raise group.unread(field, "rounded activations are not computed", "null")
    for given in (settings, group):
        if given.get("format", formats[0]) not in (*formats, _MIXED):
            raise given.contradiction("format", repr(formats[0]), module.name)
    weights = group.inner("weights")
    bits = 8 if module.scheme == DENSE else module.scheme.bits
    if weights is None:
        raise group.contradiction("weights", f"{bits} bits", module.name, "null")
    found = weights.get("num_bits", 8)
    if type(found) is not int or found != bits:
        raise weights.contradiction("num_bits", bits, module.name)
    kind = "int" if module.scheme.integer else "float"
    if weights.get("type", "int") != kind:
        raise weights.contradiction("type", repr(kind), module.name)
    symmetric = weights.flag("symmetric")
    expected = module.scheme.symmetric or not module.scheme.integer
    if (symmetric is not False) != expected:
        raise weights.contradiction("symmetric", str(expected).lower(), module.name)
    if weights.get("dynamic", False) is not False:
        raise weights.contradiction("dynamic", "false", module.name)
    if module.scheme == DENSE:
        _confirm_fp8(weights, module)
        return
    if weights.get("block_structure") is not None:
        raise weights.contradiction("block_structure", "null", module.name)
    _confirm_groups_of_inputs(weights, module)
    _confirm_order(weights, module)


def _formats(module: PackedModule) -> tuple[str, ...]:
    """The formats in which a module may be stored as it is; the first is the usual one."""
    if module.scheme == DENSE:
        return _FP8
    if module.scheme.kind == "e2m1":
        return (_NVFP4,) if module.scheme.block_size == 16 else (_MXFP4,)
    return (_FORMAT,)


def _confirm_fp8(weights: Settings, module: PackedModule) -> None:
    """Compare `strategy` and `block_structure` with the shape of the scales."""
    block = weights.get("block_structure")
    if isinstance(block, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", block):
        block = [int(size) for size in block.split("x")]
    if block is not None and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise weights.wrong("block_structure", "null, or two numbers above 0")
    strategy = weights.get("strategy", "tensor" if block is None else "block")
    shape, rows = module.scale_shape, module.shape[0]
    if strategy == "tensor":
        fitting = module.groups == 1
    elif strategy == "channel":
        fitting = shape in ((rows,), (rows, 1))
    else:
        fitting = strategy == "block" and block is not None and fits_blocks(block, module)
    if not fitting:
        raise weights.contradiction("strategy", f"scales {list(shape)}", module.name)


def _confirm_groups_of_inputs(weights: Settings, module: PackedModule) -> None:
    """Compare `strategy` and `group_size` with the number of a row's scales."""
    columns = module.shape[1]
    size = weights.get("group_size")
    if size is not None and (type(size) is not int or size == 0 or size < -1):
        raise weights.wrong("group_size", "null, -1 or a number of inputs")
    inferred = "channel" if size in (None, -1) else "group"
    strategy = weights.get("strategy", inferred)
    if strategy == "channel":
        if module.groups != 1:
            raise weights.contradiction("strategy", "'group'", module.name)
        if size not in (None, -1):
            raise weights.contradiction("group_size", "null or -1", module.name)
    elif strategy not in ("group", "tensor_group"):
        expected = "'channel'" if module.groups == 1 else "'group'"
        raise weights.contradiction("strategy", expected, module.name)
    elif size is None or size * module.groups != columns:
        raise weights.contradiction("group_size", columns // module.groups, module.name)


def _confirm_order(weights: Settings, module: PackedModule) -> None:
    order = weights.get("actorder")
    if not isinstance(order, str | bool | None) or order not in (*_SCATTERED, *_IN_ORDER):
        raise weights.wrong("actorder", "null, 'static', 'weight' or 'group'")
    if order in _SCATTERED and not module.has_g_idx:
        raise weights.contradiction(
            "actorder", "null or 'static' (there is no weight_g_idx)", module.name
        )
