"""What vLLM 0.33 demands of a Mixtral: read in its source (see `programs`), never run.

Knows summaries of headers and settings only.
"""

from collections.abc import Callable, Iterator

from qmix.formats.layouts import gptq_config
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.readers.storage import (
    EXPERT,
    StorageSummary,
    fused_name,
    gptq_settings,
    missing_fields,
)
from qmix.weights.scheme import GROUP_SIZES, Scheme

_GPTQ_FIELDS = ("bits", "group_size", "desc_act", "sym")
_AWQ_FIELDS = ("bits|w_bit", "group_size|q_group_size", "zero_point")


def problems(summary: StorageSummary) -> Iterator[str]:
    """Why it would refuse a checkpoint; nothing if it loads."""
    problems_of: dict[Layout, Callable[[StorageSummary], Iterator[str]]] = {
        "bitsandbytes": lambda _: iter(["bitsandbytes left its core in 0.28"]),
        "ModelOpt": lambda it: missing_fields(it.settings, ("quant_algo|quantization",)),
        "FP8": lambda it: missing_fields(it.settings, ("quant_method|quantization",)),
        "GPTQ": gptq_problems,
        "AWQ": awq_problems,
        "compressed-tensors": lambda it: missing_fields(it.settings, ("config_groups",)),
        "MLX": lambda _: iter(["it has no reader of MLX's layout"]),
        "HQQ": lambda _: iter(["its documentation no longer lists HQQ"]),
    }
    for layout in sorted(summary.layouts):
        yield from problems_of[layout](summary)
    if summary.dialect == "stacked":
        yield "it knows experts by their classic names, each apart"
    if summary.dialect == "gptqmodel":
        yield "it knows only the classic names of experts, which qmix export writes"
    if any(module.endswith(".gate") for module in summary.packed):
        yield "it builds the router unquantized"
    yield from mixed_fusions(summary)


def awq_problems(summary: StorageSummary) -> Iterator[str]:
    """What its AWQ loader demands and the checkpoint does not meet."""
    yield from missing_fields(summary.settings, _AWQ_FIELDS)
    if any(
        scheme.integer and scheme.group_size == -1 for scheme in summary.expert_schemes.values()
    ):
        yield "it divides the inputs of AWQ's experts by the group size, and takes no -1"


def gptq_problems(summary: StorageSummary) -> Iterator[str]:
    """What vLLM 0.33's GPTQ loader demands and the checkpoint does not meet."""
    config, unreadable = gptq_settings(summary, _GPTQ_FIELDS)
    if config is None:
        yield from unreadable
        return
    settings = summary.settings
    assert settings is not None
    if any(isinstance(settings[name], list) for name in _GPTQ_FIELDS):
        yield "its settings are lists of one element"
    act_order = settings["desc_act"] not in (False, [False])
    sizes = [config.group_size, *(rule.group_size for rule in config.rules if not rule.excluded)]
    if act_order and any(size not in (None, -1) for size in sizes):
        yield "it dropped act-order (desc_act) except for groups of all inputs"
    packed = {name: scheme for name, scheme in summary.schemes.items() if scheme.integer}
    if not all(scheme.symmetric for scheme in packed.values()):
        yield "it takes symmetric weights only"
    if any(scheme.bits not in (4, 8) for scheme in packed.values()):
        yield "it takes 4 or 8 bits only"
    for size in dict.fromkeys(scheme.group_size for scheme in packed.values()):
        if size not in (-1, *GROUP_SIZES):
            yield f"it does not know groups of {size}"
    yield from _contradicted_scheme(summary, config)


def _contradicted_scheme(summary: StorageSummary, config: gptq_config.GPTQConfig) -> Iterator[str]:
    """The first module for which the settings give vLLM another scheme than the tensors have."""
    for module, scheme in summary.schemes.items():
        # It finds out by itself which layers are dense, except experts.
        asked = scheme.integer or EXPERT.fullmatch(module)
        if not asked or module.endswith(".gate"):
            continue
        fused = fused_name(module)
        assumed = config.scheme_of(fused)
        if assumed != scheme:
            yield f"it takes {fused} for {assumed}, but {module} is {scheme}"
            return


def mixed_fusions(summary: StorageSummary) -> Iterator[str]:
    """The first of the modules that vLLM fuses although its parts are stored in different ways."""
    fused: dict[str, set[Scheme]] = {}
    for module, scheme in summary.schemes.items():
        fused.setdefault(fused_name(module), set()).add(scheme)
    for name, schemes in fused.items():
        if len(schemes) > 1:
            different = " and ".join(map(str, schemes))
            yield f"all parts of {name} must have one scheme, found {different}"
            return
