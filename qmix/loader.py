"""Checkpoint -> module, module -> checkpoint. Knows modules by their names, not by their classes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from qmix.formats import Checkpoint, bnb, open_checkpoint, shards
from qmix.formats.names import ModelTensor
from qmix.layers import Linear
from qmix.weights import NF4, Dense, Weight

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
    fill(modules, checkpoint, dtype or checkpoint.dtype, target)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not absent, absent
    return model.eval()


def fill(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every module that is there its weight, by the checkpoint's canonical names."""
    for tensor in checkpoint.tensors:
        module = modules.get(tensor.prefix)
        if isinstance(module, Linear):
            module.store(_placed(checkpoint.weight(tensor), dtype, device, tensor, checkpoint))
        elif module is not None:
            data = checkpoint.read(tensor.name).to(device=device, dtype=dtype)
            module.weight = nn.Parameter(data)


def save(
    model: nn.Module,
    config: MixtralConfig,
    directory: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and sharded safetensors, each weight as it is stored."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    taken = [path.name for path in folder.glob("*.safetensors")]
    if taken:
        raise UsageError(
            "the directory holds a checkpoint already",
            where=str(folder),
            found=", ".join(taken[:3]),
        )
    dtype = next(model.parameters()).dtype
    stored = dict(_stored(model, config))
    groups = [_tensors(name, weight) for name, weight in stored.items()]
    shards.write_shards(
        folder,
        [
            [shards.Planned(n, t.dtype, tuple(t.shape)) for n, t in group.items()]
            for group in groups
        ],
        groups,
        max_shard_bytes,
    )
    packed = {name: weight for name, weight in stored.items() if isinstance(weight, NF4)}
    quantization = config.quantization_config
    if packed and quantization is None:
        attention = any(".self_attn." in name for name in packed)
        scheme = next(iter(packed.values())).scheme
        quantization = bnb.config(scheme, dtype, attention=attention)
    written = config.replace(
        dtype=str(dtype).removeprefix("torch."), quantization_config=quantization
    )
    (folder / "config.json").write_text(written.to_json(), encoding="utf-8")


def _stored(model: nn.Module, config: MixtralConfig) -> list[tuple[str, Weight | Tensor]]:
    found: list[tuple[str, Weight | Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            if name == "lm_head" and config.tie_word_embeddings:
                continue
            found.append((f"{name}.weight", module.stored))
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            found.append((f"{name}.weight", module.weight.data))
    return found


def _tensors(name: str, stored: Weight | Tensor) -> dict[str, Tensor]:
    """What a file holds of one weight, by tensor name."""
    if isinstance(stored, NF4):
        return bnb.pack(stored, name.removesuffix(".weight"))
    if isinstance(stored, Dense):
        return {name: stored.data}
    if isinstance(stored, Tensor):
        return {name: stored}
    raise UnsupportedError(
        f"{type(stored).__name__} weights are not written here",
        where=name,
        remedy="Keep the directory they were loaded from.",
    )


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
