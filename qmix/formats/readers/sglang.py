"""What SGLang 0.5.23 demands of a Mixtral: read in its source (see `programs`), never run.

On an NVIDIA GPU. Its loader is a copy of vLLM's of 2024 and has gone its own way since: act-order
is still there, and GPTQ's experts follow no rule of their own. Knows summaries of headers and
settings only.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from qmix.formats.layouts.name_matcher import NameMatcher
from qmix.formats.layouts.settings import Settings
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.readers.storage import (
    EXPERT,
    StorageSummary,
    fused_name,
    gptq_settings,
    missing_fields,
)
from qmix.formats.readers.vllm import awq_problems, mixed_fusions
from qmix.weights.scheme import DENSE, GROUP_SIZES

_EXPRESSION = "re:"  # before a target that is a regular expression
_GPTQ_FIELDS = ("quant_method", "bits", "group_size", "desc_act", "sym")
_EXAMINED: frozenset[Layout] = frozenset(
    ("GPTQ", "AWQ", "compressed-tensors", "bitsandbytes", "HQQ", "MLX")
)


def examined(summary: StorageSummary) -> bool:
    """Whether its readers of all these layouts were looked at."""
    return summary.layouts <= _EXAMINED and not summary.is_auto_round


def problems(summary: StorageSummary) -> Iterator[str]:
    """Why it would refuse a checkpoint or misread it; nothing if it loads."""
    problems_of: dict[Layout, Callable[[StorageSummary], Iterator[str]]] = {
        "bitsandbytes": lambda _: iter(["its bitsandbytes loader has no names for a Mixtral"]),
        "GPTQ": _gptq_problems,
        "AWQ": _awq_problems,
        "compressed-tensors": _compressed_problems,
        "MLX": lambda _: iter(["it reads MLX's layout on a Mac only"]),
        "HQQ": lambda _: iter(["it has no reader of HQQ's layout"]),
    }
    for layout in sorted(summary.layouts):
        yield from problems_of[layout](summary)
    if summary.dialect != "classic":
        yield "it knows only the classic names of experts, which qmix export writes"
    if not summary.plain_heads:
        yield "it ignores head_dim and takes hidden_size over the number of heads"
    for module in ("lm_head", ".gate"):
        if any(name.endswith(module) for name in summary.packed):
            yield f"it builds {'the head' if module == 'lm_head' else 'the router'} unquantized"
    yield from mixed_fusions(summary)


def _gptq_problems(summary: StorageSummary) -> Iterator[str]:
    """All of GPTQ goes through `gptq_marlin`; plain `gptq` is left for other hardware."""
    config, unreadable = gptq_settings(summary, _GPTQ_FIELDS)
    if config is None:
        yield from unreadable
        return
    for scheme in dict.fromkeys(s for s in summary.schemes.values() if s.integer):
        if not scheme.symmetric or scheme.bits not in (4, 8):
            yield "it takes symmetric weights of 4 or 8 bits only"
        if scheme.group_size not in (-1, *GROUP_SIZES):
            yield f"it does not know groups of {scheme.group_size}"
    # GPTQMarlinConfig.get_quant_method asks `dynamic` about linear layers only.
    without_rules = replace(config, rules=())
    for module, scheme in summary.schemes.items():
        if module == "lm_head" or module.endswith(".gate"):
            continue
        fused, expert = fused_name(module), EXPERT.fullmatch(module)
        assumed = (without_rules if expert else config).scheme_of(fused)
        if assumed != scheme:
            yield f"it takes {fused} for {assumed}, but {module} is {scheme}"
            return


def _awq_problems(summary: StorageSummary) -> Iterator[str]:
    """Only `awq_marlin` has experts, and it takes zero points only."""
    settings = summary.settings or {}
    if settings.get("zero_point") is False:
        yield "it takes AWQ with zero points only"
    yield from awq_problems(summary)


def _compressed_problems(summary: StorageSummary) -> Iterator[str]:
    """A layer's experts are looked up as `experts.0.gate_proj`, whatever the files call them.

    An expression that matches this name decides, or else the group of all linear layers.
    """
    settings = summary.settings
    missing = list(missing_fields(settings, ("config_groups",)))
    if missing or settings is None:
        yield from missing
        return
    parsed = Settings(settings, "quantization_config")
    groups = parsed.inner("config_groups")
    listed = [g for g in map(groups.inner, groups.fields) if g] if groups else []
    targets = [(target, group) for group in listed for target in group.strings("targets")]
    named = [(target, group) for target, group in targets if target.startswith(_EXPRESSION)]
    general = next((group for target, group in targets if target == "Linear"), None)
    rules = _matcher([target for target, _ in named])
    ignored = _matcher([t for t in parsed.strings("ignore") if t.startswith(_EXPRESSION)])
    for module, scheme in summary.expert_schemes.items():
        layer = fused_name(module)
        asked = f"{layer}.0.gate_proj"
        found = rules.first(asked)
        group = general if found is None else named[found][1]
        assumed = "16-bit" if ignored.first(asked) is not None else _said(group)
        stored = "16-bit" if scheme == DENSE else f"int{scheme.bits} g{scheme.group_size}"
        if assumed != stored and (scheme == DENSE or scheme.integer):
            yield f"it takes {layer} for {assumed}, but {module} is {stored}"
            return


def _matcher(targets: Sequence[str]) -> NameMatcher:
    expressions = ((target, target.removeprefix(_EXPRESSION)) for target in targets)
    return NameMatcher(tuple(expressions), "quantization_config")


def _said(group: Settings | None) -> str:
    """The bits and the group size that a group of the settings gives."""
    weights = group.inner("weights") if group else None
    if weights is None:
        return "nothing that its settings say"
    return f"int{weights.get('num_bits')} g{weights.get('group_size', -1)}"
