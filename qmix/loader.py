"""Checkpoint -> module, module -> checkpoint. Knows modules by their names, not by their classes."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ResourceError, UsageError
from qmix.formats import Checkpoint, names, open_checkpoint, packing, shards
from qmix.formats.names import ModelTensor
from qmix.kernels import Packed
from qmix.layers import Linear
from qmix.placement import Placement
from qmix.scheme import DENSE
from qmix.weights import Dense, Weight

Model = TypeVar("Model", bound=nn.Module)

SHARD_BYTES = 4_900_000_000


def load(
    build: Callable[[MixtralConfig], Model],
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Model:
    """Build a model without storage and fill it, one tensor at a time.

    Args:
        build: the class: MixtralModel, MixtralForCausalLM.
        dtype: of dense weights and activations; default: the checkpoint's.
        device: default: the GPU if there is one.
    """
    target = target_device(device)
    checkpoint = open_checkpoint(directory)
    with torch.device("meta"):
        model = build(checkpoint.config)
    modules = dict(model.named_modules())
    if "model.embed_tokens" not in modules:  # a model without its head has no "model." before names
        modules = {f"model.{name}": module for name, module in modules.items()}
    placement = Placement()
    pack = placement.pack if target.type == "cuda" else None
    fill(modules, checkpoint, dtype or checkpoint.dtype, target, pack)
    if not placement.complete:
        warnings.warn(f"slower than it could be: {placement}", stacklevel=2)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    fresh = getattr(model, "initialise_absent", None)
    if fresh is not None:
        fresh(target, dtype or checkpoint.dtype)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise CheckpointError(
            "the checkpoint is of a model without this head",
            where=str(directory),
            found=f"no {', '.join(absent)}",
            remedy="Load it as MixtralModel.",
        )
    return model.eval()


def fill(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    finish: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give every module that is there its weight, by the checkpoint's canonical names.

    Args:
        finish: called with each decoder layer that is complete, before the next one is read.
    """
    missing = Counter(tensor.layer for tensor in checkpoint.tensors)
    for tensor in checkpoint.tensors:
        module = modules.get(tensor.prefix)
        if isinstance(module, Linear):
            module.store(_placed(checkpoint.weight(tensor), dtype, device, tensor, checkpoint))
        elif module is not None:
            data = checkpoint.read(tensor.name).to(device=device, dtype=dtype)
            module.weight = nn.Parameter(data)
        missing[tensor.layer] -= 1
        if finish is not None and tensor.layer is not None and not missing[tensor.layer]:
            finish(modules[f"model.layers.{tensor.layer}"])


def save(
    model: nn.Module,
    config: MixtralConfig,
    directory: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and sharded safetensors, each weight as it is stored (qmix.formats.packing).

    Whatever layout integers came from they are written as GPTQ: version 2 if a zero is 0, their
    inputs' groups as they were. The codes and scales do not change, in packed order or not.

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
    weights = {m: _described(own) for m, own in stored.items() if not isinstance(own, Tensor)}
    dtype = next(model.parameters()).dtype
    version = packing.version_of(weights.values())
    quantization = packing.quantization_config(
        {names.canonical(module): weight.scheme for module, weight in weights.items()},
        dtype,
        version=version,
        act_order=packing.act_order(weights.values()),
    )
    plan = [_planned(module, own) for module, own in stored.items()]
    folder.mkdir(parents=True, exist_ok=True)
    packed = (
        {f"{module}.weight": own}
        if isinstance(own, Tensor)
        else packing.pack(_standard(own), module, version=version)
        for module, own in stored.items()
    )
    shards.write_shards(folder, plan, packed, max_shard_bytes)
    written = config.replace(
        dtype=str(dtype).removeprefix("torch."), quantization_config=quantization
    )
    (folder / "config.json").write_text(written.to_json(), encoding="utf-8")


def _stored(model: nn.Module, config: MixtralConfig) -> Iterator[tuple[str, Weight | Tensor]]:
    """The modules that have a weight: a Weight where it is a linear layer's."""
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            if name != "lm_head" or not config.tie_word_embeddings:
                yield name, module.stored
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            yield name, module.weight.data


def _standard(weight: Weight) -> Weight:
    return weight.standard() if isinstance(weight, Packed) else weight


def _described(weight: Weight) -> Weight:
    """What says how a weight is stored: itself; in packed order all but its codes."""
    if isinstance(weight, Packed):
        return weight.kept or weight.standard()
    return weight


def _planned(module: str, stored: Weight | Tensor) -> list[shards.Planned]:
    scheme = DENSE if isinstance(stored, Tensor) else stored.scheme
    specs = packing.packed_specs(module, tuple(stored.shape), scheme, stored.dtype)
    return [shards.Planned(name, *spec) for name, spec in specs.items()]


def _placed(
    weight: Weight,
    dtype: torch.dtype,
    device: torch.device,
    tensor: ModelTensor,
    checkpoint: Checkpoint,
) -> Weight:
    """On the device; dense weights in `dtype`, packed ones with their scales untouched."""
    if not isinstance(weight, Dense):
        return weight.to(device)
    data = weight.data.to(device=device, dtype=dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(data).all()):
        raise CheckpointError(
            f"tensor {tensor.name}: not finite in float16",
            where=str(checkpoint.entry(tensor.name).file),
            remedy="Load it as bfloat16 or float32.",
        )
    return replace(weight, data=data)


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The floating dtype of a name, with or without `torch.`; None and 'auto': the checkpoint's.

    Raises:
        UsageError: another name.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name == "auto":
        return None
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UsageError(
            "no such dtype", where="dtype", expected="one of " + ", ".join(known), found=name
        )
    return known[name]


def target_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; None is the GPU if there is one.

    Raises:
        UsageError: no such device. ResourceError: no CUDA device is available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            "no such device", where="device", found=str(error).split("\n")[0]
        ) from None
    if target.type not in ("cpu", "cuda"):
        raise UsageError(
            "no such device", where="device", expected="cpu or cuda", found=str(target)
        )
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "no CUDA device is available",
            where="device",
            found=str(target),
            remedy="Use --device cpu, or check the driver.",
        )
    return target
