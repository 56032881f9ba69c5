"""Which programs load a checkpoint, and why others do not: a pure function of headers and settings.

Tiny Mixtrals were tried on a CPU in transformers 5.23.0 with compressed-tensors 0.20.0, and in
gptqmodel 7.7.0. Of vLLM and SGLang the source was read (see `readers.programs`). Knows no files.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from qmix.formats.layouts.settings import Settings
from qmix.formats.readers import sglang, vllm
from qmix.formats.readers.programs import PROGRAMS, Program
from qmix.formats.readers.storage import StorageSummary, missing_fields
from qmix.weights.scheme import Scheme

Outcome = Literal["loads", "refuses", "noise", "unknown"]


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


def reader_support(summary: StorageSummary) -> tuple[ReaderSupport, ...]:
    """One entry for each program; the first is qmix, which has already read the headers.

    Raises:
        CheckpointError: compressed-tensors' settings have a field of a wrong type.
    """
    qmix = ReaderSupport(reader="qmix", outcome="loads", reason="", tried=True)
    if summary.gguf is not None:
        return qmix, support_of("llama.cpp", summary)
    named: tuple[Program, ...] = ("vllm", "sglang", "transformers")
    readers = (qmix, *(support_of(name, summary) for name in named), _gptqmodel(summary))
    if "MLX" in summary.layouts:
        mlx = ReaderSupport(reader="mlx-lm 0.32", outcome="loads", reason="", tried=True)
        return (*readers, mlx)
    return readers


def support_of(program: Program, summary: StorageSummary) -> ReaderSupport:
    """What one program makes of a checkpoint.

    Raises:
        CheckpointError: see `reader_support`.
    """
    asked: dict[Program, Callable[[StorageSummary], ReaderSupport]] = {
        "vllm": _vllm,
        "sglang": _sglang,
        "transformers": _transformers,
        "llama.cpp": _llama_cpp,
    }
    if summary.gguf is not None and program != "llama.cpp":
        return _untried(PROGRAMS[program].release, "its reader of GGUF files was not looked at")
    return asked[program](summary)


def _vllm(summary: StorageSummary) -> ReaderSupport:
    if summary.is_auto_round:
        reason = "its reader of AutoRound's settings was not looked at"
        return _untried(PROGRAMS["vllm"].release, reason)
    return _read("vllm", vllm.problems(summary))


def _sglang(summary: StorageSummary) -> ReaderSupport:
    if not sglang.examined(summary):
        layout = "AutoRound's settings" if summary.is_auto_round else "this layout"
        return _untried(PROGRAMS["sglang"].release, f"its reader of {layout} was not looked at")
    return _read("sglang", sglang.problems(summary))


def _read(program: Program, problems: Iterator[str]) -> ReaderSupport:
    """The verdict of a program whose source was read."""
    found = dict.fromkeys(problems)
    return ReaderSupport(
        reader=PROGRAMS[program].release,
        outcome="refuses" if found else "loads",
        reason="; ".join(found),
        tried=PROGRAMS[program].tried,
    )


def _llama_cpp(summary: StorageSummary) -> ReaderSupport:
    reason = "each expert has tensors of its own, as until 2024" if summary.gguf == "single" else ""
    if summary.gguf is None:
        reason = "it reads GGUF files only"
    return ReaderSupport(
        reader=PROGRAMS["llama.cpp"].release,
        outcome="refuses" if reason else "loads",
        reason=reason,
        tried=True,
    )


def _transformers(summary: StorageSummary) -> ReaderSupport:
    outcome: Outcome = "loads"
    reason = ""
    tried = True
    if "bitsandbytes" in summary.layouts:
        outcome = "refuses"
        reason = "its experts are one parameter, which bitsandbytes' tensors do not fit"
    elif summary.is_auto_round:
        tried = "GPTQ" in summary.layouts
        outcome = "loads" if tried else "unknown"
        reason = "with the package auto-round 0.16, which computes in float16"
    elif "HQQ" in summary.layouts:
        return _untried(
            PROGRAMS["transformers"].release, "it asks for a GPU, and its experts are one parameter"
        )
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
    return ReaderSupport(
        reader=PROGRAMS["transformers"].release, outcome=outcome, reason=reason, tried=tried
    )


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
    if settings is None or list(missing_fields(settings, ("config_groups",))):
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
    if summary.is_auto_round:
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
