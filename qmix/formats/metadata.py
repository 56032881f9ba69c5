"""A checkpoint as its headers describe it: config, each weight by its canonical name, and how it is stored.

How a weight is stored is decided from its tensors' names and shapes, never from the config. Knows no
torch: opening one takes milliseconds. Shape letters: N outputs, K inputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError
from qmix.formats import names
from qmix.formats.files.safetensors_header import DTYPES, TensorInfo
from qmix.formats.files.shard_index import read_headers
from qmix.formats.layouts import gptq_config, tensor_names
from qmix.formats.layouts.tensor_names import Layout
from qmix.formats.mistral import detect
from qmix.formats.names import ModelTensor
from qmix.weights.scheme import GROUP_SIZES, NF4_BLOCK_SIZES, Kind, Scheme

_FLOATS = ("F32", "F16", "BF16")

# Marks of layouts that are not read, so that they are refused by name.
_FOREIGN = {
    ".SCB": "bitsandbytes LLM.int8",
    ".W_q": "HQQ",
    ".trellis": "EXL3",
    ".q_weight": "EXL2",
    ".gate_up_proj": "fused experts",
}


@dataclass(frozen=True)
class Packing:
    """How one weight is packed, and the canonical names of its tensors.

    Those that the layout demands are among them even if the files lack them.
    """

    layout: Layout
    tensor_names: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointMetadata:
    """The headers of a checkpoint whose tensor set is exactly that of the model.

    Attributes:
        config: of config.json.
        tensor_infos: of the files, by the names there.
        tensors: what the model needs, in walking order.
        stored_names: canonical tensor name -> name in the files.
        settings: what GPTQ's tensors do not say by themselves.
    """

    directory: Path
    config: MixtralConfig
    tensor_infos: Mapping[str, TensorInfo]
    tensors: tuple[ModelTensor, ...]
    stored_names: Mapping[str, str]
    settings: gptq_config.GPTQConfig = field(default_factory=gptq_config.GPTQConfig)

    @property
    def dtype(self) -> str:
        """The checkpoint's floating dtype by torch's name: the config's, else the embedding's."""
        if self.config.dtype is not None:
            return self.config.dtype
        return DTYPES[self.tensor_info("model.embed_tokens.weight").dtype][0]

    def tensor_info(self, name: str) -> TensorInfo:
        return self.tensor_infos[self.stored_names[name]]

    def packing(self, tensor: ModelTensor) -> Packing | None:
        """How the weight is packed, decided from its tensors; None if it is stored as it is."""
        prefix, stored_names = tensor.prefix, self.stored_names
        if not tensor.linear:
            return None
        if members := tensor_names.bnb_names(prefix, stored_names):
            return Packing("bitsandbytes", tuple(dict.fromkeys((tensor.name, *members))))
        if members := tensor_names.compressed_names(prefix, stored_names):
            return Packing("compressed-tensors", members)
        members = tensor_names.awq_names(prefix, stored_names)
        if members and self.tensor_info(members[0]).shape[:1] == tensor.shape[1:]:
            return Packing("AWQ", members)
        if members := tensor_names.gptq_names(prefix, stored_names):
            return Packing("GPTQ", members)
        return None

    def module_settings(self, packed: Packing) -> gptq_config.ModuleSettings:
        """What GPTQ's settings say of a weight."""
        return self.settings.for_module(
            self.stored_names[packed.tensor_names[0]].rpartition(".")[0]
        )

    def scheme_of(self, tensor: ModelTensor, packed: Packing) -> Scheme:
        """The scheme of a packed weight, as far as shapes and settings tell.

        An AWQ weight counts as asymmetric although all its zeros may be 8.
        """
        shapes = {
            name.rpartition(".")[2]: self.tensor_info(name).shape for name in packed.tensor_names
        }
        if packed.layout == "bitsandbytes":
            blocks, count = math.prod(shapes.get("absmax", (0,))), math.prod(tensor.shape)
            # Sizes that give the same number of blocks differ in the last block only.
            fitting = [size for size in NF4_BLOCK_SIZES if -(-count // size) == blocks]
            block = 64 if 64 in fitting or not fitting else fitting[0]
            kind: Kind = "fp4" if "bitsandbytes__fp4" in shapes else "nf4"
            return Scheme(kind=kind, block_size=block, double_quant="nested_absmax" in shapes)
        columns = tensor.shape[1]
        bits: int | None = 4
        if packed.layout == "compressed-tensors":
            groups, symmetric = shapes["weight_scale"][-1], "weight_zero_point" not in shapes
            bits = tensor_names.compressed_bits(shapes["weight_packed"][-1], columns)
        else:
            groups = shapes["scales"][0]
            symmetric = packed.layout == "GPTQ" and self.module_settings(packed).symmetric
            if packed.layout == "GPTQ":
                bits = tensor_names.gptq_bits(shapes["qweight"][0], columns)
        size = columns // max(groups, 1)
        return Scheme(
            kind="int8" if bits == 8 else "int4",
            group_size=size if size in GROUP_SIZES else -1,
            symmetric=symmetric,
        )

    def quantization_settings(self, beside: str | None) -> tuple[Mapping[str, Any] | None, str]:
        """The settings and their file: config.json's, else those of the file `beside` it."""
        if self.config.quantization_config is not None:
            return self.config.quantization_config, str(self.directory / "config.json")
        if beside is not None and (self.directory / beside).exists():
            return strict_json.read(self.directory / beside), str(self.directory / beside)
        return None, str(self.directory)


def read_metadata(directory: str | Path) -> CheckpointMetadata:
    """Open a directory and match its tensors against its config, before any data is read.

    Raises:
        CheckpointError: tensors are missing, left over or of a wrong shape; the first five are named.
        UnsupportedError: a layout that is not read, Mistral's own files among them.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise CheckpointError(
            "no such directory",
            where=str(folder),
            remedy="Give the folder that holds config.json and the safetensors files.",
        )
    detect.refuse_raw(folder)
    config = MixtralConfig.from_pretrained(folder)
    headers = read_headers(folder)
    stored_names: dict[str, str] = {}
    for name in headers:
        if names.ignored(name):
            continue
        canonical = names.canonical(name)
        if canonical in stored_names:
            raise CheckpointError(
                "the same tensor under two names",
                where=str(headers[name].file),
                found=f"{stored_names[canonical]} and {name}",
            )
        stored_names[canonical] = name
    if names.count(config) > len(headers) + 1000:  # absurd sizes are not spelled out
        raise CheckpointError(
            "not the tensors of the model that config.json describes",
            where=str(folder),
            expected=f"at least {names.count(config)} tensors",
            found=len(headers),
            remedy="The download is incomplete, or config.json is another model's.",
        )
    tensors = tuple(names.model_tensors(config))
    if config.tie_word_embeddings:
        stored_names.pop("lm_head.weight", None)  # a saved copy of the embedding
    _refuse_foreign(folder, stored_names)
    metadata = CheckpointMetadata(folder, config, headers, tensors, stored_names)
    metadata = replace(metadata, settings=_settings(metadata))
    _match(metadata)
    return metadata


def _settings(metadata: CheckpointMetadata) -> gptq_config.GPTQConfig:
    """Check what the config says of the layouts that the tensors have."""
    packings = (metadata.packing(tensor) for tensor in metadata.tensors)
    found = {packed.layout for packed in packings if packed}
    config = metadata.config.quantization_config
    method = config.get("quant_method") if config else None
    if "compressed-tensors" in found:
        tensor_names.check_compressed(*metadata.quantization_settings(None))
    # AWQ's other versions may look like GPTQ without g_idx; the config tells them by name.
    if "AWQ" in found or ("GPTQ" in found and method == "awq"):
        tensor_names.check_awq(*metadata.quantization_settings(tensor_names.AWQ_FILE))
    if "GPTQ" in found:
        return gptq_config.parse(*metadata.quantization_settings(gptq_config.FILE))
    return gptq_config.GPTQConfig()


def _refuse_foreign(folder: Path, stored_names: Mapping[str, str]) -> None:
    for name in stored_names:
        for suffix, layout in _FOREIGN.items():
            if name.endswith(suffix):
                raise UnsupportedError(
                    f"{layout} checkpoints are not read",
                    where=str(folder),
                    expected="16-bit, or 4-bit of bitsandbytes, GPTQ, AWQ or compressed-tensors",
                    found=stored_names[name],
                    remedy="Quantize the 16-bit checkpoint with qmix quantize.",
                )


def _match(metadata: CheckpointMetadata) -> None:
    """Every tensor used exactly once, none missing, none left over."""
    folder, stored_names = metadata.directory, metadata.stored_names
    left = set(stored_names)
    missing: list[str] = []
    for tensor in metadata.tensors:
        packed = metadata.packing(tensor)
        needed = packed.tensor_names if packed else (tensor.name,)
        missing += [name for name in needed if name not in left]
        left -= set(needed)
        if packed or tensor.name not in stored_names:
            continue
        header = metadata.tensor_info(tensor.name)
        if header.shape != tensor.shape:
            raise wrong_shape(str(header.file), tensor, header.shape)
        if header.dtype not in _FLOATS:
            raise CheckpointError(
                f"tensor {tensor.name}: wrong dtype",
                where=str(header.file),
                expected="F32, F16 or BF16",
                found=DTYPES[header.dtype][0],
            )
    if missing or left:
        named = [f"missing {n}" for n in missing[:5]] + [f"left over {n}" for n in sorted(left)[:5]]
        config = metadata.config
        raise CheckpointError(
            f"not the tensors of a Mixtral with {config.num_hidden_layers} layers and "
            f"{config.num_local_experts} experts: {len(missing)} missing, {len(left)} left over",
            where=str(folder if missing else metadata.tensor_info(min(left)).file),
            expected="each tensor of config.json's model once",
            found="; ".join(named[:5]),
            remedy="The download is incomplete, or config.json is another model's.",
        )


def wrong_shape(where: str, tensor: ModelTensor, found: tuple[int, ...]) -> CheckpointError:
    """The error of a tensor that has another shape than the model's."""
    return CheckpointError(
        f"tensor {tensor.name}: wrong shape",
        where=where,
        expected=list(tensor.shape),
        found=list(found),
        remedy="config.json and the files do not belong together.",
    )
