"""Checkpoint -> module: weights are read one by one, and placed. Knows modules by their names."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from qmix.errors import CheckpointError, UnsupportedError
from qmix.experts.reader import ExpertReader
from qmix.formats import Checkpoint
from qmix.formats.files.shards import check_finite
from qmix.formats.names import ModelTensor
from qmix.kernels.backend import Backend
from qmix.kernels.cpu.library import library
from qmix.models import offload
from qmix.models.device_offload import DeviceOffload
from qmix.models.heat_record import HeatRecord
from qmix.models.offload import Tiers
from qmix.models.pack import Packer
from qmix.models.quantization import QuantizedCheckpoint
from qmix.models.read_ahead import read_all
from qmix.nn.embedding import Embedding
from qmix.nn.stored import StoredModule
from qmix.quantities import counted
from qmix.weights.dense import Dense, Weight, all_finite

_HOST = torch.device("cpu")
Progress = Callable[[int, int], None]  # bytes that have been read, and all
OnRead = Callable[[int], None]  # bytes that have been read just now


def fill_model(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tiers: Tiers | None,
    backend: Backend = "qmix",
    progress: Progress | None = None,
) -> None:
    """Give a model without storage its weights, one tensor at a time, experts in their tiers.

    Args:
        modules: by the checkpoint's canonical names.
        tiers: where experts are kept; None: all of them on the device.
        backend: the packed layout is that of `qmix` on a GPU.
        progress: called with bytes that have been read, and all that will be.

    Raises:
        CheckpointError: a tensor is damaged, or not finite in `dtype`.
        ResourceError: the tiers do not fit.
    """
    packs = device.type == "cuda" and backend == "qmix"
    for hint in _hints(checkpoint, dtype, packs=packs):
        warnings.warn(hint, stacklevel=5)
    on_cpu = tiers is not None or device.type == "cpu"
    compiled = dtype == torch.bfloat16 or any(map(checkpoint.packing, checkpoint.tensors))
    if on_cpu and backend == "qmix" and compiled:
        library()  # compiled now, if it is the first time, and not within the first token
    packer = Packer()
    on_read = _counted(checkpoint, modules, tiers, progress)
    if tiers is None:
        pack = packer.pack if packs else None
        fill(modules, checkpoint, dtype, device, pack, on_read=on_read)
    else:
        packer_of_slots = packer if backend == "qmix" else None
        _offload(modules, checkpoint, dtype, device, tiers, packer_of_slots, on_read)
    if not packer.complete:
        warnings.warn(f"slower than it could be: {packer}", stacklevel=5)


def _counted(
    checkpoint: Checkpoint,
    modules: Mapping[str, nn.Module],
    tiers: Tiers | None,
    progress: Progress | None,
) -> OnRead:
    """What counts the bytes that are read, and tells `progress`."""
    if progress is None:
        return _uncounted
    sizes = {"expert": 0, "other": 0}
    for tensor in checkpoint.tensors:
        if tensor.prefix in modules:
            nbytes = sum(checkpoint.entry(name).nbytes for name in checkpoint.stored(tensor))
            sizes["expert" if tensor.kind == "expert" else "other"] += nbytes
    config = checkpoint.config
    share = 1.0
    if tiers is not None and not tiers.device:
        share = min(1.0, tiers.host / (config.num_hidden_layers * config.num_local_experts))
    total, done = sizes["other"] + int(share * sizes["expert"]), 0

    def on_read(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        progress(done, total)

    return on_read


def _uncounted(nbytes: int) -> None:
    """Nobody wants to know."""


def _hints(checkpoint: Checkpoint, dtype: torch.dtype, *, packs: bool) -> Iterator[str]:
    """What a user should know of a checkpoint that loads in another way than its files say.

    Args:
        packs: its weights are brought into a GPU's packed layout.
    """
    metadata, folder = checkpoint.metadata, checkpoint.metadata.directory.name
    bits = 8 * dtype.itemsize
    scales = {
        "activations": len(metadata.activation_scales),
        "a KV cache": len(metadata.cache_scales),
    }
    found = [f"{counted(count, 'scale')} of {of}" for of, count in scales.items() if count]
    if found:
        verb = "is" if sum(scales.values()) == 1 else "are"
        yield f"{folder}: {' and '.join(found)} {verb} not used: qmix computes in {bits} bits"
    widened = offload.packed_footprint(checkpoint, dtype).widened if packs else None
    if widened is not None:
        yield f"{folder}: {widened}"
    packings = map(checkpoint.packing, checkpoint.tensors)
    if not isinstance(checkpoint, QuantizedCheckpoint) and any(
        packing is not None and packing.dense for packing in packings
    ):
        yield (
            f"{folder}: FP8 weights are loaded in {bits} bits; "
            "qmix quantize SRC OUT makes a 4-bit checkpoint of them"
        )


def _offload(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    tiers: Tiers,
    packer: Packer | None,
    on_read: OnRead,
) -> None:
    """Fill a model whose experts do not all fit its device.

    Experts that slots of device memory cannot hold stay on the host, and the CPU multiplies them.

    Args:
        packer: None if the device's backend knows no packed layout.
    """
    checked: set[str] = set()  # an expert may be read for each token, and is checked once

    def finish(weight: Weight, tensor: ModelTensor) -> Weight:
        placed = _placed(weight, dtype, _HOST, tensor, checkpoint, check=tensor.name not in checked)
        checked.add(tensor.name)
        return placed

    reader = ExpertReader(checkpoint, dtype, finish)
    blocks = offload.blocks_of(modules)
    heat = HeatRecord(checkpoint, tiers.settings, persistent=tiers.persistent)
    if tiers.device and packer is not None:
        sizes = offload.packed_footprint(checkpoint, dtype).experts
        try:
            offloading = _filled_in_slots(
                modules, checkpoint, dtype, device, packer, on_read,
                DeviceOffload(reader, len(blocks), sizes, tiers, heat.policy, device),
            )  # fmt: skip
        except UnsupportedError as error:
            warnings.warn(
                f"experts stay in host memory, and the CPU multiplies them: {error.what}",
                stacklevel=6,
            )
            packer.forget()
        else:
            heat.save_after(offloading.finish(blocks))
            return
    pack = None
    if packer is not None and device.type == "cuda":
        pack = partial(packer.pack, experts=False)
    fill(modules, checkpoint, dtype, device, pack, experts=False, on_read=on_read)
    heat.save_after(offload.offload_to_host(blocks, reader, tiers, heat.policy, on_read))


def _filled_in_slots(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    packer: Packer,
    on_read: OnRead,
    offloading: DeviceOffload,
) -> DeviceOffload:
    """Fill a model, and hand over each layer's experts as soon as they are packed.

    Raises:
        UnsupportedError: slots cannot hold the experts of a layer.
    """

    def take(layer: nn.Module) -> None:
        packer.pack(layer)
        offloading.take(*offload.blocks_of(dict(layer.named_modules())))

    fill(modules, checkpoint, dtype, device, take, on_read=on_read)
    return offloading


def fill(
    modules: Mapping[str, nn.Module],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    finish: Callable[[nn.Module], None] | None = None,
    *,
    experts: bool = True,
    on_read: OnRead = _uncounted,
) -> None:
    """Give each of the modules its weight; tensors of other modules are not read.

    Args:
        modules: by the checkpoint's canonical names.
        finish: called with each decoder layer once it is complete, before the next one is read.
        experts: False leaves the experts out.
        on_read: called with the bytes of each weight once it has its place.
    """
    tensors = [
        tensor
        for tensor in checkpoint.tensors
        if tensor.prefix in modules and (experts or tensor.kind != "expert")
    ]
    missing = Counter(tensor.layer for tensor in tensors)
    for tensor, stored in read_all(checkpoint, tensors, device):
        module = modules[tensor.prefix]
        if isinstance(module, StoredModule):
            weight = _placed(checkpoint.built(tensor, stored), dtype, device, tensor, checkpoint)
            if isinstance(module, Embedding):
                module.store(weight, dtype)
            else:
                module.store(weight)
        else:
            data = stored[tensor.name]
            module.weight = nn.Parameter(_converted(data, dtype, device, tensor, checkpoint))
        on_read(sum(checkpoint.entry(name).nbytes for name in checkpoint.stored(tensor)))
        missing[tensor.layer] -= 1
        if finish is not None and tensor.layer is not None and not missing[tensor.layer]:
            finish(modules[f"model.layers.{tensor.layer}"])


def _placed(
    weight: Weight,
    dtype: torch.dtype,
    device: torch.device,
    tensor: ModelTensor,
    checkpoint: Checkpoint,
    *,
    check: bool = True,
) -> Weight:
    """The weight on the device; in `dtype` if it is dense, with its scales unchanged if not.

    Args:
        check: refuse values of a dense weight that are not finite.
    """
    if not isinstance(weight, Dense):
        return weight.to(device)
    if not check:
        return replace(weight, data=weight.data.to(device=device, dtype=dtype))
    return replace(weight, data=_converted(weight.data, dtype, device, tensor, checkpoint))


def _converted(
    data: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    tensor: ModelTensor,
    checkpoint: Checkpoint,
) -> Tensor:
    """A dense tensor on the device in `dtype`.

    Raises:
        CheckpointError: it holds NaN or infinity, or a value beyond the range of `dtype`.
    """
    converted = data.to(device=device, dtype=dtype)
    if all_finite(converted):  # then `data` was, too
        return converted
    file = checkpoint.entry(tensor.name).file
    check_finite(tensor.name, file, data)
    others = "bfloat16 or float32" if dtype == torch.float16 else "float32"
    raise CheckpointError(
        f"tensor {tensor.name}: not finite in {str(dtype).removeprefix('torch.')}",
        where=str(file),
        remedy=f"Load it as {others}.",
    )
