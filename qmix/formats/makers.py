"""Which tool made a checkpoint: the one that its settings name, else those that write its layout.

Knows no tensors.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.formats.files.manifest import MANIFEST
from qmix.formats.layouts.headers import LAYOUT_OF
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.metadata import CheckpointMetadata

# The tools that write each layout.
MAKERS: Mapping[Layout, str] = {
    "GGUF": "llama.cpp",
    "bitsandbytes": "transformers with bitsandbytes",
    "ModelOpt": "NVIDIA ModelOpt",
    "FP8": "llm-compressor, ModelOpt, transformers, AutoFP8",
    "compressed-tensors": "llm-compressor",
    "MLX": "mlx-lm",
    "HQQ": "hqq",
    "AWQ": "AutoAWQ, AutoRound",
    "GPTQ": "AutoGPTQ, GPTQModel, AutoRound",
}
_LONGEST = 80  # characters of a name that a file states


def made_by(metadata: CheckpointMetadata) -> str:
    """The tool in words; "" if every weight is dense and nothing names one."""
    layouts = {packed.layout for packed in map(metadata.packing, metadata.tensors) if packed}
    if version := _qmix_version(metadata.directory):
        return f"qmix {version}"
    for layout in sorted(layouts):
        row = LAYOUT_OF[layout]
        settings, _ = metadata.quantization_settings(row.file, row.field)
        if stated := next(_stated(settings or {}), None):
            return stated[:_LONGEST]
    likely = "; ".join(MAKERS[layout] for layout in sorted(layouts))
    return f"{likely} (not stated)" if likely else ""


def _qmix_version(folder: Path) -> str | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    version = strict_json.read(path).get("qmix")
    return version[:_LONGEST] if isinstance(version, str) else None


def _stated(settings: Mapping[str, Any]) -> Iterator[str]:
    """The tools that settings name, the one that quantized first."""
    producer, meta = settings.get("producer"), settings.get("meta")
    if isinstance(producer, Mapping) and isinstance(name := producer.get("name"), str):
        yield f"{name} {producer.get('version', '')}".rstrip()
    if isinstance(meta, Mapping) and isinstance(tools := meta.get("quantizer"), list):
        yield from (tool.replace(":", " ") for tool in tools if isinstance(tool, str))
    if isinstance(version := settings.get("autoround_version"), str):
        yield f"auto-round {version}"
    method, version = settings.get("quant_method"), settings.get("version")
    if method == "compressed-tensors" and isinstance(version, str):
        yield f"llm-compressor (compressed-tensors {version})"
