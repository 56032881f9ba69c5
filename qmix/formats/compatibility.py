"""Which programs load a checkpoint, and why others do not: a pure function of headers and settings.

Tiny Mixtrals were tried on a CPU in transformers 5.23.0 with compressed-tensors 0.20.0, and in
gptqmodel 7.7.0. Of vLLM 0.33.0 the source was read (auto_gptq.py, gptq_utils.py, mixtral.py). Knows
no files.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qmix.errors import QmixError
from qmix.formats.layouts import auto_round_config, gptq_config
from qmix.formats.layouts.headers import LAYOUT_OF
from qmix.formats.layouts.settings import Settings
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.metadata import CheckpointMetadata
from qmix.weights.scheme import DENSE, GROUP_SIZES, Scheme

Outcome = Literal["loads", "refuses", "noise", "unknown"]
Dialect = Literal["classic", "gptqmodel", "stacked"]

_EXPERT = re.compile(r"(model\.layers\.\d+\.block_sparse_moe\.experts)\.\d+\.w[123]")
_QKV = re.compile(r"(model\.layers\.\d+\.self_attn\.)[qkv]_proj")
_GPTQ_FIELDS = ("bits", "group_size", "desc_act", "sym")
_AWQ_FIELDS = ("bits|w_bit", "group_size|q_group_size", "zero_point")


@dataclass(frozen=True, kw_only=True)
class StorageSummary:
    """How the weights of a checkpoint are stored: what decides which programs load it.

    Attributes:
        schemes: of every linear layer by its module's classic name, dense ones included.
        layouts: of the packed weights.
        dialect: the names of the expert tensors are classic or gptqmodel's, or they are stacked.
        settings: config.json's `quantization_config`, else those beside it; None if there are none.
        gguf: whether each layer's experts lie in one tensor, if the files are GGUF; else None.
    """

    schemes: Mapping[str, Scheme]
    layouts: frozenset[Layout]
    dialect: Dialect
    settings: Mapping[str, Any] | None
    gguf: Literal["stacked", "single"] | None = None

    @property
    def expert_schemes(self) -> dict[str, Scheme]:
        """The schemes of the experts' matrices, by module name."""
        return {name: scheme for name, scheme in self.schemes.items() if _EXPERT.fullmatch(name)}

    @property
    def has_packed_experts(self) -> bool:
        """Whether any expert's matrix is stored as integers."""
        return any(scheme.integer for scheme in self.expert_schemes.values())


@dataclass(frozen=True, kw_only=True)
class ReaderSupport:
    """What one program makes of a checkpoint.

    Attributes:
        outcome: `noise` is a model that loads without an error and computes something else.
        tried: whether that program was run; if not, its source was read.
    """

    reader: str
    outcome: Outcome
    reason: str
    tried: bool


def storage_summary(metadata: CheckpointMetadata) -> StorageSummary:
    """Summarize how a checkpoint is stored."""
    packings = {tensor: metadata.packing(tensor) for tensor in metadata.tensors}
    schemes = {
        tensor.prefix: metadata.scheme_of(packing) if packing else DENSE
        for tensor, packing in packings.items()
        if tensor.linear
    }
    experts = {
        name: metadata.stored_names[name]
        for tensor, packing in packings.items()
        if tensor.kind == "expert"
        for name in (packing.names if packing else (tensor.name,))
    }
    dialect: Dialect = "gptqmodel"
    if all(name == stored for name, stored in experts.items()):
        dialect = "classic"
    elif any("[" in stored for stored in experts.values()):
        dialect = "stacked"
    layouts = frozenset(packing.layout for packing in packings.values() if packing)
    files = {LAYOUT_OF[layout].file for layout in layouts} - {None}
    return StorageSummary(
        schemes=schemes,
        layouts=layouts,
        dialect=dialect,
        settings=metadata.quantization_settings(files.pop() if len(files) == 1 else None)[0],
        gguf=_gguf_experts(metadata),
    )


def _gguf_experts(metadata: CheckpointMetadata) -> Literal["stacked", "single"] | None:
    if metadata.container != "GGUF":
        return None
    return "stacked" if any(name.endswith("]") for name in metadata.tensor_infos) else "single"


def reader_support(summary: StorageSummary) -> tuple[ReaderSupport, ...]:
    """One entry for each program; the first is qmix, which has already read the headers.

    Raises:
        CheckpointError: compressed-tensors' settings have a field of a wrong type.
    """
    qmix = ReaderSupport(reader="qmix", outcome="loads", reason="", tried=True)
    if summary.gguf is not None:
        return qmix, _llama_cpp(summary)
    readers = (
        qmix,
        _vllm(summary),
        _transformers(summary),
        _gptqmodel(summary),
    )
    if "MLX" in summary.layouts:
        mlx = ReaderSupport(reader="mlx-lm 0.32", outcome="loads", reason="", tried=True)
        return (*readers, mlx)
    return readers


def _llama_cpp(summary: StorageSummary) -> ReaderSupport:
    single = summary.gguf == "single"
    return ReaderSupport(
        reader="llama.cpp (2026)",
        outcome="refuses" if single else "loads",
        reason="each expert has tensors of its own, as until 2024" if single else "",
        tried=True,
    )


def _is_auto_round(summary: StorageSummary) -> bool:
    """Whether GPTQ's or AWQ's tensors have AutoRound's settings."""
    return bool(summary.layouts & {"GPTQ", "AWQ"}) and auto_round_config.named(summary.settings)


def _vllm(summary: StorageSummary) -> ReaderSupport:
    if _is_auto_round(summary):
        return _untried("vLLM 0.33", "its reader of AutoRound's settings was not looked at")
    problems_of: dict[Layout, Callable[[StorageSummary], Iterator[str]]] = {
        "bitsandbytes": lambda _: iter(["bitsandbytes left its core in 0.28"]),
        "ModelOpt": lambda it: _missing_fields(it.settings, ("quant_algo|quantization",)),
        "FP8": lambda it: _missing_fields(it.settings, ("quant_method|quantization",)),
        "GPTQ": vllm_gptq_problems,
        "AWQ": lambda it: _missing_fields(it.settings, _AWQ_FIELDS),
        "compressed-tensors": lambda it: _missing_fields(it.settings, ("config_groups",)),
        "MLX": lambda _: iter(["it has no reader of MLX's layout"]),
        "HQQ": lambda _: iter(["its documentation no longer lists HQQ"]),
    }
    problems = [
        reason for layout in sorted(summary.layouts) for reason in problems_of[layout](summary)
    ]
    if summary.dialect == "stacked":
        problems.append("it knows experts by their classic names, each apart")
    if summary.dialect == "gptqmodel":
        problems.append("it knows only the classic names of experts, which qmix export writes")
    problems += _mixed_fusions(summary)
    return ReaderSupport(
        reader="vLLM 0.33",
        outcome="refuses" if problems else "loads",
        reason="; ".join(dict.fromkeys(problems)),
        tried=False,
    )


def vllm_gptq_problems(summary: StorageSummary) -> Iterator[str]:
    """What vLLM 0.33's GPTQ loader demands and the checkpoint does not meet."""
    settings = summary.settings
    missing = list(_missing_fields(settings, _GPTQ_FIELDS))
    if missing or settings is None:
        yield from missing
        return
    try:
        config = gptq_config.parse(settings, "quantization_config")
    except QmixError as error:
        yield str(error)
        return
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
    if any(module.endswith(".gate") for module in packed):
        yield "it builds the router unquantized"
    yield from _contradicted_scheme(summary, config)


def _contradicted_scheme(summary: StorageSummary, config: gptq_config.GPTQConfig) -> Iterator[str]:
    """The first module for which the settings give vLLM another scheme than the tensors have."""
    for module, scheme in summary.schemes.items():
        # It finds out by itself which layers are dense, except experts.
        asked = scheme.integer or _EXPERT.fullmatch(module)
        if not asked or module.endswith(".gate"):
            continue
        fused = _fused_name(module)
        assumed = config.scheme_of(fused)
        if assumed != scheme:
            yield f"it takes {fused} for {assumed}, but {module} is {scheme}"
            return


def _fused_name(module: str) -> str:
    """The name by which vLLM asks the rules about a module."""
    if expert := _EXPERT.fullmatch(module):
        return expert[1]
    qkv = _QKV.fullmatch(module)
    return f"{qkv[1]}qkv_proj" if qkv else module


def _mixed_fusions(summary: StorageSummary) -> Iterator[str]:
    """The first of the modules that vLLM fuses although its parts are stored in different ways."""
    fused: dict[str, set[Scheme]] = {}
    for module, scheme in summary.schemes.items():
        fused.setdefault(_fused_name(module), set()).add(scheme)
    for name, schemes in fused.items():
        if len(schemes) > 1:
            different = " and ".join(map(str, schemes))
            yield f"all parts of {name} must have one scheme, found {different}"
            return


def _missing_fields(settings: Mapping[str, Any] | None, fields: tuple[str, ...]) -> Iterator[str]:
    present = {name for name, value in (settings or {}).items() if value is not None}
    missing = [field.split("|")[0] for field in fields if not present & set(field.split("|"))]
    if missing:
        yield f"the settings lack {', '.join(missing)}"


def _transformers(summary: StorageSummary) -> ReaderSupport:
    outcome: Outcome = "loads"
    reason = ""
    tried = True
    if "bitsandbytes" in summary.layouts:
        outcome = "refuses"
        reason = "its experts are one parameter, which bitsandbytes' tensors do not fit"
    elif _is_auto_round(summary):
        tried = "GPTQ" in summary.layouts
        outcome = "loads" if tried else "unknown"
        reason = "with the package auto-round 0.16, which computes in float16"
    elif "HQQ" in summary.layouts:
        return _untried("transformers 5.23", "it asks for a GPU, and its experts are one parameter")
    elif summary.layouts & {"GPTQ", "AWQ"}:
        outcome, tried = ("noise", True) if summary.has_packed_experts else ("unknown", False)
        reason = "experts stay random: GPTQ and AWQ reach only nn.Linear, which experts are not"
    elif "MLX" in summary.layouts:
        outcome, reason = "refuses", "MLX's settings name no quant_method"
    elif "ModelOpt" in summary.layouts:
        outcome, reason = "refuses", "it does not know ModelOpt's layout"
    elif any(_is_nvfp4(scheme) for scheme in summary.expert_schemes.values()):
        outcome, reason = "noise", "it leaves out the global scales of NVFP4 experts"
    elif "FP8" in summary.layouts:
        outcome, reason, tried = _fp8_in_transformers(summary)
    elif "compressed-tensors" in summary.layouts:
        outcome, reason = _compressed_in_transformers(summary)
    return ReaderSupport(reader="transformers 5.23", outcome=outcome, reason=reason, tried=tried)


def _untried(reader: str, reason: str) -> ReaderSupport:
    return ReaderSupport(reader=reader, outcome="unknown", reason=reason, tried=False)


def _is_nvfp4(scheme: Scheme) -> bool:
    return scheme.kind == "e2m1" and scheme.block_size == 16


def _fp8_in_transformers(summary: StorageSummary) -> tuple[Outcome, str, bool]:
    """(the outcome, the reason, whether it was tried)."""
    method = (summary.settings or {}).get("quant_method")
    if method == "modelopt":
        return "noise", "it leaves out ModelOpt's scales of FP8 weights", True
    if method in ("compressed-tensors", "fp8"):
        return "loads", "activations are rounded to 8 bits", True
    return "unknown", "", False


def _compressed_in_transformers(summary: StorageSummary) -> tuple[Outcome, str]:
    settings = summary.settings
    if settings is None or list(_missing_fields(settings, ("config_groups",))):
        return "unknown", "there are no settings of compressed-tensors"
    if not all(scheme.symmetric for scheme in summary.schemes.values() if scheme.integer):
        return "refuses", "it does not unpack the zero points of experts"
    experts = {scheme for scheme in summary.expert_schemes.values() if scheme.integer}
    if len(experts) > 1:
        bits = _assumed_expert_bits(Settings(settings, "quantization_config"))
        reason = "it unpacks all experts by one group, and theirs differ"
        return ("noise" if any(scheme.bits > bits for scheme in experts) else "refuses"), reason
    return "loads", "its experts are unpacked to 16 bits"


def _assumed_expert_bits(settings: Settings) -> int:
    """Bits of the group that transformers 5.23 chooses for experts (`get_experts_scheme`).

    They are 8 if there is no group.

    Raises:
        CheckpointError: a field of a group is of a wrong type.
    """
    groups = settings.inner("config_groups")
    inner = [groups.inner(name) for name in groups.fields] if groups else []
    listed = [group for group in inner if group]
    by_name = [
        group
        for group in listed
        if any(t.startswith("re:") and "experts" in t for t in group.strings("targets"))
    ]
    by_class = [
        group for group in listed if any(not t.startswith("re:") for t in group.strings("targets"))
    ]
    chosen = next(iter([*by_name, *by_class, *listed]), None)
    weights = chosen.inner("weights") if chosen else None
    bits = weights.get("num_bits", 8) if weights else 8
    return bits if isinstance(bits, int) else 8


def _gptqmodel(summary: StorageSummary) -> ReaderSupport:
    outcome: Outcome = "loads"
    reason = ""
    tried = True
    layouts, settings = summary.layouts, summary.settings or {}
    classic = summary.dialect == "classic" and summary.has_packed_experts
    if _is_auto_round(summary):
        return _untried("gptqmodel 7.7", "it was not tried with AutoRound's settings")
    if "bitsandbytes" in layouts:
        outcome, reason = "refuses", "it reads only its own spelling of these settings"
    elif "GPTQ" in layouts and classic:
        outcome, reason = "refuses", "it knows only its own names of experts"
    elif "AWQ" in layouts and classic:
        outcome, reason = "noise", "experts stay zero: it knows only its own names of them"
    elif "GPTQ" in layouts and not settings:
        outcome, reason, tried = "unknown", "there are no settings in config.json", False
    elif "GPTQ" in layouts and settings.get("sym") in (False, [False]):
        if settings.get("checkpoint_format") != "gptq_v2":
            outcome = "refuses"
            reason = "it takes asymmetric weights of version 1 only from itself"
    elif layouts & {"compressed-tensors", "ModelOpt", "FP8", "MLX", "HQQ"} or not layouts:
        outcome, reason, tried = "unknown", "it is made for GPTQ and AWQ", False
    return ReaderSupport(reader="gptqmodel 7.7", outcome=outcome, reason=reason, tried=tried)
