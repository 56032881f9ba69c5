"""Saving a model: the checkpoint that it was read from, byte for byte, or a dense one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.experts.reader import FileWeight
from qmix.formats import names
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.files.shard_writer import write_shards
from qmix.formats.layouts import writer
from qmix.formats.tensor_spec import TensorSpec
from qmix.kernels import PackedWeight
from qmix.models.saving_folder import saving
from qmix.nn.embedding import Embedding
from qmix.nn.stored import StoredModule
from qmix.weights.dense import Weight
from qmix.weights.scheme import DENSE


def save(
    model: nn.Module,
    config: MixtralConfig,
    directory: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
    documents: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write config.json and sharded safetensors, each weight as it is stored.

    Integers are written as GPTQ, whatever layout they were read from: as version 2 if a zero is 0,
    and with the same groups of inputs. Their codes and scales do not change, whether or not the
    model holds them in the packed layout. See qmix.formats.layouts.writer.

    Args:
        documents: JSON files to write beside them, by name.

    Raises:
        UsageError: the directory holds weights or a config already.
        WriteError: a file cannot be written; the directory is as it was.
        UnsupportedError: the weights have two layouts, or integers do not fill whole words; no
            file is written.
    """
    weights = dict(_weights(model, config))
    dtype = next(model.parameters()).dtype
    version, act_order, schemes, specs = 1, False, {}, []
    for module, weight in weights.items():
        if isinstance(weight, Tensor):
            specs.append(_specs(module, weight))
            continue
        described = _without_codes(weight)  # one at a time: a FileWeight is read from its file
        version = max(version, writer.version_of(described))
        act_order = act_order or writer.act_order(described)
        schemes[names.canonical(module)] = described.scheme
        specs.append(_specs(module, described if isinstance(weight, FileWeight) else weight))
    quantization = writer.quantization_config(schemes, dtype, version=version, act_order=act_order)
    tensors = (
        {f"{module}.weight": weight}
        if isinstance(weight, Tensor)
        else writer.pack(_standard(weight), module, version=version)
        for module, weight in weights.items()
    )
    saved = config.replace(
        dtype=str(dtype).removeprefix("torch."), quantization_config=quantization
    )
    with saving(Path(directory)) as folder:
        write_shards(folder, specs, tensors, max_shard_bytes)
        saved.save_pretrained(folder)
        for name, document in (documents or {}).items():
            strict_json.write(folder / name, document)


def _weights(model: nn.Module, config: MixtralConfig) -> Iterator[tuple[str, Weight | Tensor]]:
    """The modules that have a weight, by name: a Weight, or the tensor of one that stays dense."""
    for name, module in model.named_modules():
        if isinstance(module, Embedding) and module.weight is not None:
            yield name, module.weight.data
        elif isinstance(module, StoredModule):
            if name != "lm_head" or not config.tie_word_embeddings:
                yield name, module.stored
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            yield name, module.weight.data


def _standard(weight: Weight) -> Weight:
    """The weight in memory, in the standard layout of its kind."""
    if isinstance(weight, FileWeight):
        return weight.load()
    return weight.unpack() if isinstance(weight, PackedWeight) else weight


def _without_codes(weight: Weight) -> Weight:
    """What says how a weight is stored: the weight itself, or a packed one's template."""
    return (isinstance(weight, PackedWeight) and weight.template) or _standard(weight)


def _specs(module: str, weight: Weight | Tensor) -> tuple[TensorSpec, ...]:
    scheme = DENSE if isinstance(weight, Tensor) else weight.scheme
    return writer.packed_specs(module, tuple(weight.shape), scheme, weight.dtype)
