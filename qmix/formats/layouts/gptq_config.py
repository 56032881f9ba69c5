"""GPTQ's settings, read and written: what config.json says of a checkpoint whose tensors are GPTQ's.

One scheme for most modules, and rules (`dynamic`, as gptqmodel 7.7 and vLLM 0.33 read them) for the
others. Knows nothing of tensors.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats.layouts.module_patterns import patterns
from qmix.formats.layouts.tensor_names import KINDS, unlisted
from qmix.weights.scheme import DENSE, GROUP_SIZES, Scheme

FILE = "quantize_config.json"  # where AutoGPTQ kept the settings, beside config.json

VERSIONS = {"gptq": 1, "gptq_v2": 2}

_MOST_RULES = 1024
# Some regular expressions take forever on a name of 60 characters. Those that files have need three
# repetitions at most, and never repeat a group.
_MOST_REPEATS, _MOST_OPTIONS = 3, 8
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]|\\[1-9]|\(\?P=")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of `dynamic`, for modules that its expression matches from their names' start.

    Attributes:
        text: as it stands in the file.
        excluded: the modules are not quantized ("-:").
        bits, group_size, symmetric: what is different; None if it is not.
    """

    text: str
    pattern: re.Pattern[str]
    excluded: bool
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ModuleSettings:
    """What the settings say of one module, its rule's overrides included.

    Attributes:
        version: 1 if the file stores each zero less one, 2 if it stores the zero.
        symmetric: every zero is half of the range.
        bits, group_size: None if the file does not say; -1 is all inputs.
        rule: the one that decided; None if it was none.
        where: the file that says so.
    """

    version: int
    symmetric: bool
    bits: int | None
    group_size: int | None
    rule: Rule | None
    where: str

    @property
    def source(self) -> str:
        """The rule, if there is one, and the file, for errors."""
        return f"the rule {self.rule.text!r} of {self.where}" if self.rule else self.where


@dataclass(frozen=True, kw_only=True)
class GPTQConfig:
    """What the tensors do not say, or say a second time.

    Attributes:
        version, symmetric, bits, group_size, where: of most modules, as in ModuleSettings.
        lm_head: whether the head is quantized.
        rules: for the others; the first that matches a module's name, as the files spell it, wins.
    """

    version: int = 1
    symmetric: bool = True
    bits: int | None = None
    group_size: int | None = None
    lm_head: bool = False
    rules: tuple[Rule, ...] = ()
    where: str = "no quantization_config"

    def for_module(self, module: str) -> ModuleSettings:
        """For one module, by its name in the files."""
        rule = next((rule for rule in self.rules if rule.pattern.match(module)), None)
        settings = ModuleSettings(
            version=self.version,
            symmetric=self.symmetric,
            bits=self.bits,
            group_size=self.group_size,
            rule=rule,
            where=self.where,
        )
        if rule is None:
            return settings
        return replace(
            settings,
            bits=self.bits if rule.bits is None else rule.bits,
            group_size=self.group_size if rule.group_size is None else rule.group_size,
            symmetric=self.symmetric if rule.symmetric is None else rule.symmetric,
        )

    def scheme_of(self, module: str) -> Scheme | None:
        """How a module is stored, from the settings alone; None if they do not say.

        The router is dense unless a rule names it, the head unless `lm_head` is true.
        """
        own = self.for_module(module)
        excluded = own.rule is not None and own.rule.excluded
        unnamed_router = own.rule is None and module.endswith(".gate")
        if excluded or unnamed_router or (module == "lm_head" and not self.lm_head):
            return DENSE
        if own.group_size is None or own.bits is None or own.bits not in KINDS:
            return None
        kind = KINDS[own.bits]
        return Scheme(kind=kind, group_size=own.group_size, symmetric=own.symmetric)


def parse(document: Mapping[str, Any] | None, where: str) -> GPTQConfig:
    """From config.json's `quantization_config` or from `quantize_config.json`.

    A missing `checkpoint_format` means v1 and a missing `sym` true, as in AutoGPTQ.

    Args:
        document: None if there is neither.
        where: the file, for errors.

    Raises:
        UnsupportedError: another layout, other bits, or a rule too intricate.
        CheckpointError: a value of the wrong type.
    """
    if document is None:
        return GPTQConfig()
    fields = unlisted(document)
    method = fields.get("quant_method", "gptq")
    if method != "gptq":
        raise CheckpointError(
            "the tensors are GPTQ's and quant_method says otherwise",
            where=where,
            expected="'gptq'",
            found=repr(method),
        )
    bits = fields.get("bits")
    if bits is not None and (type(bits) is not int or bits not in KINDS):
        raise UnsupportedError(
            "GPTQ is read in 4 or 8 bits only",
            where=f"{where}: bits",
            expected="4 or 8",
            found=repr(bits),
        )
    symmetric, lm_head = fields.get("sym", True), fields.get("lm_head", False)
    return GPTQConfig(
        version=_version(fields, where),
        symmetric=_flag(symmetric, f"{where}: sym"),
        bits=bits,
        group_size=_group_size(fields.get("group_size"), f"{where}: group_size"),
        lm_head=_flag(lm_head, f"{where}: lm_head"),
        rules=_rules(fields.get("dynamic"), f"{where}: dynamic"),
        where=where,
    )


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


def _flag(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise CheckpointError(
            "wrong type", where=where, expected="true or false", found=repr(value)
        )
    return value


def _group_size(size: Any, where: str) -> int | None:
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
    if not isinstance(dynamic, dict) or len(dynamic) > _MOST_RULES:
        raise CheckpointError(
            "not a table of rules",
            where=where,
            expected=f"at most {_MOST_RULES} expressions, each with its settings",
            found=f"{len(dynamic)} rules" if isinstance(dynamic, dict) else repr(dynamic)[:80],
        )
    return tuple(_rule(text, overrides, where) for text, overrides in dynamic.items())


def _rule(text: str, overrides: Any, where: str) -> Rule:
    where = f"{where}: {text[:80]}"
    expression = text.removeprefix("-:").removeprefix("+:")
    if not isinstance(overrides, dict):
        raise CheckpointError("no settings", where=where, found=repr(overrides)[:80])
    intricate = (
        len(re.findall(r"[*+{]", expression)) > _MOST_REPEATS
        or expression.count("?") > _MOST_OPTIONS
        or _REPEATED_GROUP.search(expression)
    )
    if intricate:
        raise UnsupportedError(
            "the rule is too intricate to be read safely",
            where=where,
            expected=f"at most {_MOST_REPEATS} repetitions, none of a group",
            remedy="Write it as several simpler rules.",
        )
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise CheckpointError("not a regular expression", where=where, found=str(error)) from None
    bits, symmetric = overrides.get("bits"), overrides.get("sym")
    if bits is not None and (type(bits) is not int or not 2 <= bits <= 8):
        raise CheckpointError("wrong bits", where=where, expected="2 to 8", found=repr(bits))
    return Rule(
        text=text,
        pattern=pattern,
        excluded=text.startswith("-:"),
        bits=bits,
        group_size=_group_size(overrides.get("group_size"), f"{where}: group_size"),
        symmetric=None if symmetric is None else _flag(symmetric, f"{where}: sym"),
    )


def config(
    schemes: Mapping[str, Scheme], *, version: int = 1, act_order: bool = False
) -> dict[str, object]:
    """The settings of a checkpoint: `quantization_config` of config.json and `quantize_config.json`.

    The fields that vLLM 0.33 and SGLang demand, and no more. The most frequent scheme becomes the
    base; every other module is named by a rule that matches gptqmodel's names too, and those of the
    modules that vLLM fuses (`qkv_proj`, `experts`) where all their parts are alike.

    Args:
        schemes: of every linear layer by its module's name, dense ones included; at least one is
            of integers, none of another layout.
        version: 1 or 2, how zeros are stored.
        act_order: whether any weight's inputs are scattered over its groups.
    """
    counts = Counter(scheme for scheme in schemes.values() if scheme.integer)
    ((base, _),) = counts.most_common(1)
    dynamic: dict[str, dict[str, object]] = {}
    for scheme in dict.fromkeys(schemes.values()):
        named = [
            module
            for module, own in schemes.items()
            if own == scheme and own != _unsaid(module, own, base)
        ]
        for pattern in patterns(named, schemes):
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


def _unsaid(module: str, scheme: Scheme, base: Scheme) -> Scheme:
    """The scheme that a module has where no rule names it."""
    is_dense = module.endswith(".gate") or (module == "lm_head" and not scheme.integer)
    return DENSE if is_dense else base


def _overrides(scheme: Scheme, base: Scheme) -> dict[str, object]:
    fields = (
        ("bits", scheme.bits, base.bits),
        ("group_size", scheme.group_size, base.group_size),
        ("sym", scheme.symmetric, base.symmetric),
    )
    return {name: own for name, own, most in fields if own != most}
