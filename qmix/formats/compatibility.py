"""Which programs load a checkpoint, and why not: a pure function of its headers and its settings.

What was tried: tiny Mixtrals in transformers 5.23.0 with compressed-tensors 0.20.0 and in gptqmodel
7.7.0, on a CPU. vLLM 0.33.0 was read (auto_gptq.py, gptq_utils.py, mixtral.py), not run. Knows no files.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qmix.errors import QmixError
from qmix.formats.layouts import gptq_config, tensor_names
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.metadata import CheckpointMetadata
from qmix.weights.scheme import DENSE, GROUP_SIZES, Scheme

Outcome = Literal["loads", "refuses", "noise", "unknown"]
Dialect = Literal["classic", "gptqmodel"]

_EXPERTS = re.compile(r"(model\.layers\.\d+\.block_sparse_moe\.experts)\.\d+\.w[123]")
_QKV = re.compile(r"(model\.layers\.\d+\.self_attn\.)[qkv]_proj")
_GPTQ_FIELDS = ("bits", "group_size", "desc_act", "sym")
_AWQ_FIELDS = ("bits|w_bit", "group_size|q_group_size", "zero_point")


@dataclass(frozen=True, kw_only=True)
class StorageSummary:
    """What the verdicts depend on.

    Attributes:
        schemes: of every linear layer by its module's classic name, dense ones included.
        layouts: of the packed weights.
        dialect: whose names the expert tensors have.
        settings: config.json's `quantization_config`, else those beside it; None if there are none.
    """

    schemes: Mapping[str, Scheme]
    layouts: frozenset[Layout]
    dialect: Dialect
    settings: Mapping[str, Any] | None

    @property
    def experts(self) -> dict[str, Scheme]:
        return {module: own for module, own in self.schemes.items() if _EXPERTS.fullmatch(module)}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of the checkpoint in one program.

    Attributes:
        outcome: `noise` is a model that loads without an error and computes something else.
        tried: with that program; else its source was read.
    """

    reader: str
    outcome: Outcome
    reason: str
    tried: bool


def verdicts(contents: StorageSummary) -> tuple[Verdict, ...]:
    """One for each program; the first is qmix, which has read the headers already."""
    return (
        Verdict(reader="qmix", outcome="loads", reason="", tried=True),
        _vllm(contents),
        _transformers(contents),
        _gptqmodel(contents),
    )


def _vllm(contents: StorageSummary) -> Verdict:
    demands: dict[Layout, Callable[[StorageSummary], Iterator[str]]] = {
        "bitsandbytes": lambda _: iter(["bitsandbytes left its core in 0.28"]),
        "GPTQ": vllm_gptq,
        "AWQ": lambda own: _missing(own.settings, _AWQ_FIELDS),
        "compressed-tensors": lambda own: _missing(own.settings, ("config_groups",)),
    }
    problems = [
        reason for layout in sorted(contents.layouts) for reason in demands[layout](contents)
    ]
    if contents.dialect == "gptqmodel":
        problems.append("it knows the classic names of experts only: qmix export writes them")
    problems += _fused_apart(contents)
    return Verdict(
        reader="vLLM 0.33",
        outcome="refuses" if problems else "loads",
        reason="; ".join(dict.fromkeys(problems)),
        tried=False,
    )


def vllm_gptq(contents: StorageSummary) -> Iterator[str]:
    """What vLLM 0.33's GPTQ loader demands of the settings and does not find; nothing if all is well."""
    missing = list(_missing(contents.settings, _GPTQ_FIELDS))
    if missing or contents.settings is None:
        yield from missing
        return
    try:
        said = gptq_config.parse(contents.settings, "quantization_config")
    except QmixError as error:
        yield str(error)
        return
    if any(isinstance(contents.settings[name], list) for name in _GPTQ_FIELDS):
        yield "its settings are lists of one element"
    act_order = contents.settings["desc_act"] not in (False, [False])
    sizes = [said.group_size, *(rule.group_size for rule in said.rules if not rule.excluded)]
    if act_order and any(size not in (None, -1) for size in sizes):
        yield "it dropped act-order (desc_act) but for groups of all inputs"
    if not all(own.symmetric for own in contents.schemes.values() if own.integer):
        yield "it takes symmetric weights only"
    for own in dict.fromkeys(own for own in contents.schemes.values() if own.integer):
        if own.group_size not in (-1, *GROUP_SIZES):
            yield f"it does not know groups of {own.group_size}"
    if any(own.integer for module, own in contents.schemes.items() if module.endswith(".gate")):
        yield "it builds the router unquantized"
    for module, own in contents.schemes.items():
        asked = _fused_name(module)
        # What is dense it finds out by itself, but for experts.
        if own.integer or _EXPERTS.fullmatch(module):
            found = said.scheme_of(asked)
            if found != own and not module.endswith(".gate"):
                yield f"it takes {asked} for {found}, but {module} is {own}"
                return


def _fused_name(module: str) -> str:
    """The name by which vLLM asks the rules about a module."""
    if experts := _EXPERTS.fullmatch(module):
        return experts[1]
    qkv = _QKV.fullmatch(module)
    return f"{qkv[1]}qkv_proj" if qkv else module


def _fused_apart(contents: StorageSummary) -> Iterator[str]:
    """Modules that vLLM fuses although they are stored in different ways."""
    fused: dict[str, set[Scheme]] = {}
    for module, own in contents.schemes.items():
        fused.setdefault(_fused_name(module), set()).add(own)
    for name, schemes in fused.items():
        if len(schemes) > 1:
            yield f"all parts of {name} must be alike, found {' and '.join(map(str, schemes))}"
            return


def _missing(settings: Mapping[str, Any] | None, fields: tuple[str, ...]) -> Iterator[str]:
    given = {name for name, value in (settings or {}).items() if value is not None}
    absent = [field.split("|")[0] for field in fields if not given & set(field.split("|"))]
    if absent:
        yield f"the settings lack {', '.join(absent)}"


def _transformers(contents: StorageSummary) -> Verdict:
    outcome: Outcome = "loads"
    reason = ""
    tried = True
    if "bitsandbytes" in contents.layouts:
        outcome = "refuses"
        reason = "experts are one parameter there, which bitsandbytes' tensors do not fit"
    elif contents.layouts & {"GPTQ", "AWQ"}:
        packed = any(own.integer for own in contents.experts.values())
        outcome, tried = ("noise", True) if packed else ("unknown", False)
        reason = "experts stay random: GPTQ and AWQ reach nn.Linear only, and experts are none"
    elif "compressed-tensors" in contents.layouts:
        outcome, reason = _compressed_in_transformers(contents)
    return Verdict(reader="transformers 5.23", outcome=outcome, reason=reason, tried=tried)


def _compressed_in_transformers(contents: StorageSummary) -> tuple[Outcome, str]:
    packed = [own for own in contents.schemes.values() if own.integer]
    if list(_missing(contents.settings, ("config_groups",))):
        return "unknown", "there are no settings of compressed-tensors"
    if not all(own.symmetric for own in packed):
        return "refuses", "it does not unpack the zero points of experts"
    experts = {own for own in contents.experts.values() if own.integer}
    if len(experts) > 1:
        assert contents.settings is not None
        bits = _bits_of_all_experts(contents.settings["config_groups"])
        reason = "it unpacks all experts by one group, and theirs differ"
        return ("noise" if any(own.bits > bits for own in experts) else "refuses"), reason
    return "loads", "its experts are unpacked to 16 bits"


def _bits_of_all_experts(groups: Any) -> int:
    """Of the group that transformers 5.23 chooses (`get_experts_scheme`); 8 if they are none."""
    listed = [group for group in groups.values() if isinstance(group, dict)]
    named = [
        group
        for group in listed
        if any(t.startswith("re:") and "experts" in t for t in group.get("targets", ()))
    ]
    by_class = [
        group for group in listed if any(not t.startswith("re:") for t in group.get("targets", ()))
    ]
    chosen = next(iter([*named, *by_class, *listed]), {})
    bits = chosen.get("weights", {}).get("num_bits", 8)
    return bits if isinstance(bits, int) else 8


def _gptqmodel(contents: StorageSummary) -> Verdict:
    outcome: Outcome = "loads"
    reason = ""
    tried = True
    layouts, settings = contents.layouts, contents.settings or {}
    classic = contents.dialect == "classic" and any(o.integer for o in contents.experts.values())
    if "bitsandbytes" in layouts:
        outcome, reason = "refuses", "it reads its own spelling of these settings only"
    elif "GPTQ" in layouts and classic:
        outcome, reason = "refuses", "it knows its own names of experts only"
    elif "AWQ" in layouts and classic:
        outcome, reason = "noise", "experts stay zeros: it knows its own names of them only"
    elif "GPTQ" in layouts and not settings:
        outcome, reason, tried = "unknown", "there are no settings in config.json", False
    elif "GPTQ" in layouts and settings.get("sym") in (False, [False]):
        if settings.get("checkpoint_format") != "gptq_v2":
            outcome, reason = "refuses", "it takes asymmetric weights in version 1 from itself only"
    elif layouts & {"compressed-tensors"} or not layouts:
        outcome, reason, tried = "unknown", "it is made for GPTQ and AWQ", False
    return Verdict(reader="gptqmodel 7.7", outcome=outcome, reason=reason, tried=tried)


def storage_summary(metadata: CheckpointMetadata) -> StorageSummary:
    """What decides which programs load a checkpoint."""
    packings = {tensor: metadata.packing(tensor) for tensor in metadata.tensors}
    schemes = {
        tensor.prefix: metadata.scheme_of(tensor, packed) if packed else DENSE
        for tensor, packed in packings.items()
        if tensor.linear
    }
    classic = all(
        metadata.stored_names[name] == name
        for tensor, packed in packings.items()
        if tensor.kind == "expert"
        for name in (packed.tensor_names if packed else (tensor.name,))
    )
    found = frozenset(packed.layout for packed in packings.values() if packed)
    beside = {"GPTQ": gptq_config.FILE, "AWQ": tensor_names.AWQ_FILE}
    files = [beside[layout] for layout in found if layout in beside]
    return StorageSummary(
        schemes=schemes,
        layouts=found,
        dialect="classic" if classic else "gptqmodel",
        settings=metadata.quantization_settings(files[0] if len(files) == 1 else None)[0],
    )
