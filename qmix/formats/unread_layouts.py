"""Layouts that are not read: how each is recognized, and what to fetch instead.

Most name their tensors as no other layout does; the others say in config.json what they are, or
are known by the names of their files. Knows no torch and reads no data.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmix.errors import UnsupportedError
from qmix.files.file_names import visible

_QUANTIZE = "the original 16-bit checkpoint for qmix quantize"
_ANOTHER = f"Fetch a GPTQ, AWQ, NF4 or GGUF file of the same model, or {_QUANTIZE}."
_EXPECTED = "16 bits, or a layout that qmix reads (see the README's table)"
# Fields of the settings that name a method; old and new tools use different ones.
_METHOD_FIELDS = ("quant_method", "quant_algo", "quant_type", "format", "quantization_method")


@dataclass(frozen=True, kw_only=True)
class UnreadLayout:
    """A layout that is refused by its name.

    Attributes:
        suffixes: of names that only its tensors have.
        methods: what its settings call it, in lower case.
        files: patterns of its files' names, in a folder without safetensors files.
        remedy: what to fetch instead.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    remedy: str = _ANOTHER


UNREAD_LAYOUTS = (
    UnreadLayout(name="bitsandbytes LLM.int8", suffixes=(".SCB",), methods=("llm_int8",)),
    UnreadLayout(name="EXL2", suffixes=(".q_weight", ".q_invperm"), methods=("exl2",)),
    UnreadLayout(name="QuIP#", suffixes=(".Qidxs", ".SU", ".SV"), methods=("quip", "quip#")),
    UnreadLayout(name="EXL3", suffixes=(".trellis", ".suh", ".svh"), methods=("exl3",)),
    UnreadLayout(name="AQLM", suffixes=(".codebooks",), methods=("aqlm",)),
    UnreadLayout(name="VPTQ", suffixes=(".centroids",), methods=("vptq",)),
    UnreadLayout(name="SqueezeLLM", suffixes=(".lookup_table",), methods=("squeezellm",)),
    # Its tensors are NVFP4's; the sign of a block's scale says that its codes are integers.
    UnreadLayout(
        name="MixFP4",
        methods=("mixfp4", "mixfp4-pack-quantized"),
        remedy=f"Fetch the NVFP4 checkpoint of the same model, or {_QUANTIZE}.",
    ),
    UnreadLayout(
        name="pickled HQQ",
        files=("qmodel.pt",),
        remedy=(
            "Fetch a version that hqq 0.2 or transformers saved as safetensors with axis=1, or "
            f"{_QUANTIZE}."
        ),
    ),
    UnreadLayout(
        name="MLX in .npz files",
        files=("weights.npz", "weights.*.npz", "model.npz"),
        remedy="Fetch a version that mlx-lm saved as safetensors (mlx-community has them).",
    ),
)


def refuse_files(folder: Path) -> None:
    """Refuse a folder without safetensors files that holds those of an unread layout.

    Raises:
        UnsupportedError: it is such a folder.
    """
    if visible(folder, "*.safetensors"):
        return
    for layout in UNREAD_LAYOUTS:
        for pattern in layout.files:
            if found := visible(folder, pattern):
                raise _refusal(layout, folder, ", ".join(path.name for path in found[:5]))


def refuse(
    folder: Path, stored_names: Mapping[str, str], quantization: Mapping[str, Any] | None
) -> None:
    """Refuse a checkpoint that has an unread layout.

    Args:
        stored_names: canonical tensor name -> name in the files.
        quantization: config.json's `quantization_config`, if it has one.

    Raises:
        UnsupportedError: a tensor's name, or the settings, are those of an unread layout.
    """
    for name, stored in stored_names.items():
        for layout in UNREAD_LAYOUTS:
            if layout.suffixes and name.endswith(layout.suffixes):
                raise _refusal(layout, folder, stored)
    for field, value in _methods(quantization or {}):
        for layout in UNREAD_LAYOUTS:
            if value.lower() in layout.methods:
                raise _refusal(layout, folder / "config.json", f"{field} {value[:80]!r}")


def _methods(quantization: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The fields that name a method, with their values."""
    given = ((field, quantization.get(field)) for field in _METHOD_FIELDS)
    return [(field, value) for field, value in given if isinstance(value, str)]


def _refusal(layout: UnreadLayout, where: Path, found: str) -> UnsupportedError:
    return UnsupportedError(
        f"{layout.name} checkpoints are not read",
        where=str(where),
        expected=_EXPECTED,
        found=found,
        remedy=layout.remedy,
    )
