"""How the weights of a checkpoint are stored: what decides which programs load it.

Summarizes headers and settings. Knows no program.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qmix.errors import QmixError
from qmix.formats.layouts import auto_round_config, gptq_config
from qmix.formats.layouts.headers import LAYOUT_OF
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.metadata import CheckpointMetadata
from qmix.weights.scheme import DENSE, Scheme

Dialect = Literal["classic", "gptqmodel", "stacked"]

EXPERT = re.compile(r"(model\.layers\.\d+\.block_sparse_moe\.experts)\.\d+\.w[123]")
_QKV = re.compile(r"(model\.layers\.\d+\.self_attn\.)[qkv]_proj")


@dataclass(frozen=True, kw_only=True)
class StorageSummary:
    """How the weights of a checkpoint are stored: what decides which programs load it.

    Attributes:
        schemes: of every linear layer by its module's classic name, dense ones included.
        layouts: of the packed weights.
        dialect: the names of the expert tensors are classic or gptqmodel's, or they are stacked.
        settings: config.json's `quantization_config`, else those beside it; None if there are none.
        gguf: whether each layer's experts lie in one tensor, if the files are GGUF; else None.
        plain_heads: whether an attention head is as wide as the hidden state over the heads.
    """

    schemes: Mapping[str, Scheme]
    layouts: frozenset[Layout]
    dialect: Dialect
    settings: Mapping[str, Any] | None
    gguf: Literal["stacked", "single"] | None = None
    plain_heads: bool = True

    @property
    def expert_schemes(self) -> dict[str, Scheme]:
        """The schemes of the experts' matrices, by module name."""
        return {name: scheme for name, scheme in self.schemes.items() if EXPERT.fullmatch(name)}

    @property
    def packed(self) -> dict[str, Scheme]:
        """The schemes of what is not dense, by module name."""
        return {name: scheme for name, scheme in self.schemes.items() if scheme != DENSE}

    @property
    def is_auto_round(self) -> bool:
        """Whether GPTQ's or AWQ's tensors have AutoRound's settings."""
        return bool(self.layouts & {"GPTQ", "AWQ"}) and auto_round_config.named(self.settings)

    @property
    def has_packed_experts(self) -> bool:
        """Whether any expert's matrix is stored as integers."""
        return any(scheme.integer for scheme in self.expert_schemes.values())


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
    config = metadata.config
    layouts = frozenset(packing.layout for packing in packings.values() if packing)
    files = {LAYOUT_OF[layout].file for layout in layouts} - {None}
    return StorageSummary(
        schemes=schemes,
        layouts=layouts,
        dialect=dialect,
        settings=metadata.quantization_settings(files.pop() if len(files) == 1 else None)[0],
        gguf=_gguf_experts(metadata),
        plain_heads=config.head_dim * config.num_attention_heads == config.hidden_size,
    )


def _gguf_experts(metadata: CheckpointMetadata) -> Literal["stacked", "single"] | None:
    if metadata.container != "GGUF":
        return None
    return "stacked" if any(name.endswith("]") for name in metadata.tensor_infos) else "single"


def fused_name(module: str) -> str:
    """The module that vLLM and SGLang make of several: all experts of a layer, or q, k and v."""
    if expert := EXPERT.fullmatch(module):
        return expert[1]
    qkv = _QKV.fullmatch(module)
    return f"{qkv[1]}qkv_proj" if qkv else module


def gptq_settings(
    summary: StorageSummary, fields: tuple[str, ...]
) -> tuple[gptq_config.GPTQConfig | None, list[str]]:
    """What GPTQ's settings say, or None and why a program cannot read them.

    Args:
        fields: that the program wants, see missing_fields.
    """
    settings = summary.settings
    missing = list(missing_fields(settings, fields))
    if missing or settings is None:
        return None, missing
    try:
        return gptq_config.parse(settings, "quantization_config"), []
    except QmixError as error:
        return None, [str(error)]


def missing_fields(settings: Mapping[str, Any] | None, fields: tuple[str, ...]) -> Iterator[str]:
    """One line if fields are absent or null; `a|b` are two spellings of one field."""
    present = {name for name, value in (settings or {}).items() if value is not None}
    missing = [field.split("|")[0] for field in fields if not present & set(field.split("|"))]
    if missing:
        yield f"the settings lack {', '.join(missing)}"
