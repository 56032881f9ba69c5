"""GPTQ's configuration, read and written: what config.json says if the tensors are GPTQ's.

It has one scheme for most modules, and rules for the others (`dynamic`, as gptqmodel 7.7 and vLLM
0.33 read them). Knows nothing of tensors.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats import names
from qmix.formats.layouts.module_patterns import expressions
from qmix.formats.layouts.name_matcher import NameMatcher
from qmix.formats.layouts.settings import PackedModule, Settings, check_head, check_packing
from qmix.formats.layouts.tensor_names import INTEGER_KINDS, without_lists
from qmix.quantities import counted
from qmix.weights.scheme import DENSE, GROUP_SIZES, Scheme

FILE = "quantize_config.json"  # where AutoGPTQ put the settings, beside config.json

VERSIONS = {"gptq": 1, "gptq_v2": 2}
READ_BITS = "2, 3, 4 or 8"

_MAX_RULES = 1024


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of `dynamic`, for the modules whose names its expression matches from the start.

    Attributes:
        text: the entry's key in the file.
        excluded: the modules are not quantized ("-:").
        bits, group_size, symmetric, act_order: what the rule overrides; None if it does not.
    """

    text: str
    excluded: bool
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ModuleSettings:
    """What the settings say of one module, its rule's overrides included.

    Attributes:
        version: 1 if the file stores each zero minus one, 2 if it stores the zero.
        symmetric: every zero is half of the range.
        bits, group_size: None if the file does not say; a group size of -1 is all inputs.
        act_order: whether inputs may be scattered over groups; None if the file does not say.
        rule: the one that decided, if any.
        where: the file with the settings.
        auto_round: the settings are AutoRound's, which stores no `g_idx` and no zero of 0 in v1.
    """

    version: int
    symmetric: bool
    bits: int | None
    group_size: int | None
    rule: Rule | None
    where: str
    act_order: bool | None = None
    auto_round: bool = False

    @property
    def source(self) -> str:
        """The rule, if any, and the file, for errors."""
        return f"the rule {self.rule.text!r} of {self.where}" if self.rule else self.where


@dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """What the tensors do not say, or what the settings repeat.

    Attributes:
        version, symmetric, bits, group_size, act_order, where: for most modules; see
            ModuleSettings.
        lm_head: whether the head is quantized.
        rules: for the other modules; the first that matches a module's name in the files wins.
        settings: the fields that were parsed; None without any.
        auto_round: see ModuleSettings.
    """

    version: int = 1
    symmetric: bool = True
    bits: int | None = None
    group_size: int | None = None
    act_order: bool | None = None
    lm_head: bool = False
    rules: tuple[Rule, ...] = ()
    where: str = "no quantization_config"
    settings: Settings | None = field(default=None, compare=False, repr=False)
    auto_round: bool = False

    @property
    def rules_field(self) -> str:
        """The field that holds the rules."""
        return "extra_config" if self.auto_round else "dynamic"

    @cached_property
    def matcher(self) -> NameMatcher:
        """The rules' expressions, in their order."""
        expressions = (
            (rule.text, rule.text.removeprefix("-:").removeprefix("+:")) for rule in self.rules
        )
        return NameMatcher(tuple(expressions), f"{self.where}: {self.rules_field}")

    def for_module(self, module: str) -> ModuleSettings:
        """The settings of one module, by its name in the files."""
        rule = self._rule(module)
        settings = ModuleSettings(
            version=self.version,
            symmetric=self.symmetric,
            bits=self.bits,
            group_size=self.group_size,
            rule=rule,
            where=self.where,
            act_order=self.act_order,
            auto_round=self.auto_round,
        )
        if rule is None:
            return settings
        return replace(
            settings,
            bits=self.bits if rule.bits is None else rule.bits,
            group_size=self.group_size if rule.group_size is None else rule.group_size,
            symmetric=self.symmetric if rule.symmetric is None else rule.symmetric,
            act_order=self.act_order if rule.act_order is None else rule.act_order,
        )

    def _rule(self, module: str) -> Rule | None:
        """The first rule that matches a module's name; any of its names if it is AutoRound's."""
        found = (self.matcher.first(name) for name in self._names(module))
        index = min((index for index in found if index is not None), default=None)
        return None if index is None else self.rules[index]

    def _names(self, module: str) -> tuple[str, ...]:
        """AutoRound's rules have the names of the model in memory, its files the classic ones."""
        if not self.auto_round:
            return (module,)
        classic = names.canonical(f"{module}.weight").removesuffix(".weight")
        return tuple(dict.fromkeys((module, *names.spellings(classic))))

    def scheme_of(self, module: str) -> Scheme | None:
        """How a module is stored according to the settings alone; None if they do not say.

        The router is dense unless a rule names it, the head unless `lm_head` is true.
        """
        settings = self.for_module(module)
        excluded = settings.rule is not None and settings.rule.excluded
        unnamed_router = settings.rule is None and module.endswith(".gate")
        if excluded or unnamed_router or (module == "lm_head" and not self.lm_head):
            return DENSE
        bits, group_size = settings.bits, settings.group_size
        if group_size is None or bits is None or bits not in INTEGER_KINDS:
            return None
        kind = INTEGER_KINDS[bits]
        return Scheme(kind=kind, group_size=group_size, symmetric=settings.symmetric)


def parse(document: Mapping[str, Any] | None, where: str) -> GPTQConfig:
    """Parse config.json's `quantization_config`, or `quantize_config.json`.

    A missing `checkpoint_format` means v1, and a missing `sym` means true, as in AutoGPTQ.

    Args:
        document: None if there is neither.
        where: the file, for errors.

    Raises:
        UnsupportedError: another layout or number of bits, or a rule that is too intricate.
        CheckpointError: a value of the wrong type, or settings of another method.
    """
    if document is None:
        return GPTQConfig()
    fields = without_lists(document)
    settings = Settings(fields, where)
    settings.check_method("gptq", "GPTQ's")
    check_packing(settings)
    bits = fields.get("bits")
    if bits is not None and (type(bits) is not int or bits not in INTEGER_KINDS):
        raise settings.unread("bits", f"GPTQ is read in {READ_BITS} bits only", READ_BITS)
    symmetric, lm_head = fields.get("sym", True), fields.get("lm_head", False)
    config = GPTQConfig(
        version=_version(fields, where),
        symmetric=checked_flag(symmetric, f"{where}: sym"),
        bits=bits,
        group_size=checked_group_size(fields.get("group_size"), f"{where}: group_size"),
        act_order=settings.flag("desc_act"),
        lm_head=checked_flag(lm_head, f"{where}: lm_head"),
        rules=_rules(fields.get("dynamic"), f"{where}: dynamic"),
        where=where,
        settings=settings,
    )
    config.matcher  # noqa: B018 - reads the expressions, so that a wrong one is refused here
    return config


def confirm(
    config: GPTQConfig, modules: Collection[PackedModule], _: Collection[Sequence[str]] = ()
) -> None:
    """Check the settings against the packed modules; see `parse`.

    Raises:
        CheckpointError: a field that the tensors contradict.
    """
    settings = config.settings
    if settings is None:
        return
    check_head(settings, modules)
    for module in modules:
        said = config.for_module(module.name)
        rule = said.rule
        if rule is not None and rule.excluded:
            expected = f"no rule that excludes {module.name}"
            raise settings.contradiction(config.rules_field, expected, module.name, rule.text)
        bits, columns = module.scheme.bits, module.shape[1]
        if said.bits in INTEGER_KINDS and said.bits != bits:
            place = _place(config, "bits", rule, rule.bits if rule else None)
            raise settings.contradiction(place, bits, module.name, said.bits)
        size = columns if said.group_size == -1 else said.group_size
        if size is not None and size * module.groups != columns:
            place = _place(config, "group_size", rule, rule.group_size if rule else None)
            expected_size = columns // module.groups
            raise settings.contradiction(place, expected_size, module.name, said.group_size)


def _place(config: GPTQConfig, name: str, rule: Rule | None, override: int | None) -> str:
    """Where a setting stands: in the rule that overrides it, or for most modules."""
    if rule is None or override is None:
        return name
    return f"{config.rules_field}: {rule.text[:60]}: {name}"


def _version(fields: Mapping[str, Any], where: str) -> int:
    given = (fields.get("checkpoint_format"), fields.get("format"))
    named = {str(layout) for layout in given if layout is not None}
    if fields.get("is_marlin_format"):
        named.add("marlin")
    if len(named) > 1:
        raise CheckpointError(
            "checkpoint_format and format differ", where=where, found=" and ".join(sorted(named))
        )
    layout = named.pop() if named else "gptq"
    if layout not in VERSIONS:
        raise UnsupportedError(
            f"GPTQ in the {layout} format is not read",
            where=where,
            expected=" or ".join(VERSIONS),
            found=layout,
            remedy="Quantize the original checkpoint with qmix quantize.",
        )
    return VERSIONS[layout]


def checked_flag(value: Any, where: str) -> bool:
    """A value that must be true or false."""
    if type(value) is not bool:
        raise CheckpointError(
            "wrong type", where=where, expected="true or false", found=repr(value)
        )
    return value


def checked_group_size(size: Any, where: str) -> int | None:
    """A group size that is read, or None."""
    if size is not None and (type(size) is not int or size not in (-1, *GROUP_SIZES)):
        raise CheckpointError(
            "unknown group size",
            where=where,
            expected=f"-1 or one of {', '.join(map(str, GROUP_SIZES))}",
            found=repr(size),
        )
    return size


def _rules(dynamic: Any, where: str) -> tuple[Rule, ...]:
    if not dynamic:
        return ()
    if not isinstance(dynamic, dict) or len(dynamic) > _MAX_RULES:
        raise CheckpointError(
            "not a table of rules",
            where=where,
            expected=f"at most {_MAX_RULES} expressions, each with its settings",
            found=counted(len(dynamic), "rule")
            if isinstance(dynamic, dict)
            else repr(dynamic)[:80],
        )
    return tuple(_rule(text, overrides, where) for text, overrides in dynamic.items())


def _rule(text: str, overrides: Any, where: str) -> Rule:
    where = f"{where}: {text[:80]}"
    if not isinstance(overrides, dict):
        raise CheckpointError(
            "wrong type", where=where, expected="an object", found=repr(overrides)[:80]
        )
    bits = overrides.get("bits")
    if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
        raise CheckpointError("wrong bits", where=where, expected="2 to 8", found=repr(bits))
    settings = Settings(overrides, where)
    check_packing(settings)
    return Rule(
        text=text,
        excluded=text.startswith("-:"),
        bits=bits,
        group_size=checked_group_size(overrides.get("group_size"), f"{where}: group_size"),
        symmetric=settings.flag("sym"),
        act_order=settings.flag("desc_act"),
    )


def quantization_config(
    schemes: Mapping[str, Scheme], *, version: int = 1, act_order: bool = False
) -> dict[str, object]:
    """The settings of a checkpoint, for config.json and for `quantize_config.json`.

    They have the fields that vLLM 0.33 and SGLang demand, and no more. The most frequent scheme
    becomes the base. Each module of another scheme is named by a rule that also matches gptqmodel's
    names, and the names of what vLLM fuses (`qkv_proj`, `experts`) if all its parts are alike.

    Args:
        schemes: of every linear layer by its module's name, dense ones included; at least one is
            of integers, and none belongs to another layout.
        version: how zeros are stored, 1 or 2.
        act_order: whether any weight's inputs are scattered over its groups.
    """
    counts = Counter(scheme for scheme in schemes.values() if scheme.integer)
    ((base, _),) = counts.most_common(1)
    dynamic: dict[str, dict[str, object]] = {}
    for scheme in dict.fromkeys(schemes.values()):
        named = [
            module
            for module, other in schemes.items()
            if other == scheme and scheme != _default(module, scheme, base)
        ]
        for pattern in expressions(named, schemes):
            sign = "+:" if scheme.integer else "-:"
            dynamic[sign + pattern] = _overrides(scheme, base) if scheme.integer else {}
    (layout,) = (name for name, number in VERSIONS.items() if number == version)
    return {
        "bits": base.bits,
        "checkpoint_format": layout,
        "desc_act": act_order,
        "dynamic": dynamic,
        "group_size": base.group_size,
        "lm_head": schemes.get("lm_head", DENSE).integer,
        "quant_method": "gptq",
        "sym": base.symmetric,
    }


def _default(module: str, scheme: Scheme, base: Scheme) -> Scheme:
    """The scheme of a module that no rule names."""
    is_dense = module.endswith(".gate") or (module == "lm_head" and not scheme.integer)
    return DENSE if is_dense else base


def _overrides(scheme: Scheme, base: Scheme) -> dict[str, object]:
    fields = (
        ("bits", scheme.bits, base.bits),
        ("group_size", scheme.group_size, base.group_size),
        ("sym", scheme.symmetric, base.symmetric),
    )
    return {name: value for name, value, default in fields if value != default}
