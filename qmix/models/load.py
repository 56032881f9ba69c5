"""Checkpoint -> module, module -> checkpoint. Knows modules by their names, not by their classes."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, ResourceError, UsageError
from qmix.experts.reader import ExpertReader
from qmix.formats import Checkpoint, open_checkpoint
from qmix.formats.names import ModelTensor
from qmix.models import offload
from qmix.models.offload import Tiers
from qmix.models.pack import Placement
from qmix.nn.linear import Linear
from qmix.weights.dense import Dense, Weight

Model = TypeVar("Model", bound=nn.Module)

_HOST = torch.device("cpu")


def load(
    build: Callable[[MixtralConfig], Model],
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    vram: str | int | None = None,
    ram: str | int | None = None,
    max_context: int | None = None,
    tiers: Tiers | None = None,
) -> Model:
    """Build a model without storage and fill it, one tensor at a time.

    Args:
        build: the class: MixtralModel, MixtralForCausalLM.
        dtype: of dense weights and activations; default: the checkpoint's.
        device: default: the GPU if there is one.
        vram, ram: memory that may be used on the device and on the host, as "16GiB" or in bytes, what
            the process has anyway included. Experts that do not fit are kept in the next tier, and the
            parameters are frozen.
        max_context: positions that the plan leaves room for.
        tiers: where experts are kept; default: as planned for these budgets.

    Raises:
        ResourceError: it does not fit the budgets, or the memory that is free.
    """
    target = target_device(device)
    checkpoint = open_checkpoint(directory)
    kept = dtype or checkpoint.dtype
    if tiers is None:
        tiers = offload.planned(checkpoint, kept, target, vram, ram, max_context)
    with torch.device("meta"):
        model = build(checkpoint.config)
    modules = dict(model.named_modules())
    if "model.embed_tokens" not in modules:  # a model without its head has no "model." before names
        modules = {f"model.{name}": module for name, module in modules.items()}
    placement = Placement()
    pack = placement.pack if target.type == "cuda" else None
    if tiers is None:
        fill(modules, checkpoint, kept, target, pack)
    else:
        _offload(modules, checkpoint, kept, target, tiers, placement)
        model.requires_grad_(requires_grad=False)
    if not placement.complete:
        warnings.warn(f"slower than it could be: {placement}", stacklevel=2)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    fresh = getattr(model, "initialise_absent", None)
    if fresh is not None:
        fresh(target, kept)
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise CheckpointError(
            "the checkpoint is of a model without this head",
            where=str(directory),
            found=f"no {', '.join(absent)}",
            remedy="Load it as MixtralModel.",
        )
    return model.eval()


def _offload(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tiers: Tiers,
    placement: Placement,
) -> None:
    """Fill a model whose experts do not all fit its device."""
    reader = ExpertReader(
        checkpoint, dtype, lambda weight, tensor: _placed(weight, dtype, _HOST, tensor, checkpoint)
    )
    blocks, memory = offload.blocks_of(modules), offload.HeatRecord(checkpoint, tiers)
    if not tiers.device:
        fill(modules, checkpoint, dtype, device, experts=False)
        memory.keep(offload.on_the_host(blocks, reader, tiers, memory.policy))
        return
    taker = offload.OnDevice(reader, len(blocks), tiers, memory.policy, device)

    def take(layer: nn.Module) -> None:
        placement.pack(layer)
        taker.take(*offload.blocks_of(dict(layer.named_modules())))

    fill(modules, checkpoint, dtype, device, take)
    memory.keep(taker.finish(blocks))


def fill(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    finish: Callable[[nn.Module], None] | None = None,
    *,
    experts: bool = True,
) -> None:
    """Give every module that is there its weight, by the checkpoint's canonical names.

    Args:
        finish: called with each decoder layer that is complete, before the next one is read.
        experts: False leaves them out.
    """
    tensors = [t for t in checkpoint.tensors if experts or t.kind != "expert"]
    missing = Counter(tensor.layer for tensor in tensors)
    for tensor in tensors:
        module = modules.get(tensor.prefix)
        if isinstance(module, Linear):
            module.store(_placed(checkpoint.weight(tensor), dtype, device, tensor, checkpoint))
        elif module is not None:
            data = checkpoint.read(tensor.name).to(device=device, dtype=dtype)
            module.weight = nn.Parameter(data)
        missing[tensor.layer] -= 1
        if finish is not None and tensor.layer is not None and not missing[tensor.layer]:
            finish(modules[f"model.layers.{tensor.layer}"])


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
