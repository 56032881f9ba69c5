"""A model to files: the checkpoint that it was read from, byte for byte, or a dense one."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.errors import UsageError
from qmix.experts.reader import FileWeight
from qmix.formats import names
from qmix.formats.files import shards
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.layouts import writer
from qmix.kernels import PackedWeight
from qmix.nn.linear import Linear
from qmix.weights.dense import Weight
from qmix.weights.scheme import DENSE


def save(
    model: nn.Module,
    config: MixtralConfig,
    directory: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and sharded safetensors, each weight as it is stored (qmix.formats.layouts.writer).

    Whatever layout integers came from they are written as GPTQ: version 2 if a zero is 0, their
    inputs' groups as they were. The codes and scales do not change, in the packed layout or not.

    Raises:
        UsageError: the directory holds weights already.
        UnsupportedError: weights of two layouts, or integers that fill no whole words; no file is
            written.
    """
    folder = Path(directory)
    taken = [path.name for path in folder.glob("*.safetensors")]
    if taken:
        raise UsageError(
            "the directory holds a checkpoint already",
            where=str(folder),
            found=", ".join(taken[:3]),
        )
    stored = dict(_stored(model, config))
    dtype = next(model.parameters()).dtype
    version, act_order, schemes, plan = 1, False, {}, []
    for module, own in stored.items():
        if isinstance(own, Tensor):
            plan.append(_planned(module, own))
            continue
        weight = _described(own)  # one at a time: some are read from their file for it
        version = max(version, writer.version_of([weight]))
        act_order = act_order or writer.act_order([weight])
        schemes[names.canonical(module)] = weight.scheme
        plan.append(_planned(module, weight if isinstance(own, FileWeight) else own))
    quantization = writer.quantization_config(schemes, dtype, version=version, act_order=act_order)
    folder.mkdir(parents=True, exist_ok=True)
    packed = (
        {f"{module}.weight": own}
        if isinstance(own, Tensor)
        else writer.pack(_standard(own), module, version=version)
        for module, own in stored.items()
    )
    shards.write_shards(folder, plan, packed, max_shard_bytes)
    written = config.replace(
        dtype=str(dtype).removeprefix("torch."), quantization_config=quantization
    )
    written.save_pretrained(folder)


def _stored(model: nn.Module, config: MixtralConfig) -> Iterator[tuple[str, Weight | Tensor]]:
    """The modules that have a weight: a Weight where it is a linear layer's."""
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            if name != "lm_head" or not config.tie_word_embeddings:
                yield name, module.stored
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            yield name, module.weight.data


def _standard(weight: Weight) -> Weight:
    if isinstance(weight, FileWeight):
        return weight.load()
    return weight.unpack() if isinstance(weight, PackedWeight) else weight


def _described(weight: Weight) -> Weight:
    """What says how a weight is stored: itself; in the packed layout all but its codes."""
    return (isinstance(weight, PackedWeight) and weight.template) or _standard(weight)


def _planned(module: str, stored: Weight | Tensor) -> list[shards.Planned]:
    scheme = DENSE if isinstance(stored, Tensor) else stored.scheme
    specs = writer.packed_specs(module, tuple(stored.shape), scheme, stored.dtype)
    return [shards.Planned(name, *spec) for name, spec in specs.items()]
