"""How many of a model's experts each memory holds, and the store on a host without a GPU.

`device_offload` makes the store of a GPU. How many experts fit is decided by `planning.plan`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from qmix import kernels
from qmix.errors import ResourceError
from qmix.experts.arena import HostArena
from qmix.experts.disk_experts import DiskExperts
from qmix.experts.disk_store import DiskStore
from qmix.experts.policy import HEAT, Policy, PolicySettings
from qmix.experts.reader import ExpertReader
from qmix.experts.residency import Residency
from qmix.formats import Checkpoint
from qmix.models.options import LoadOptions
from qmix.models.quantization import QuantizedCheckpoint
from qmix.nn.linear import Linear
from qmix.nn.moe import SparseMoeBlock
from qmix.planning import machine, plan
from qmix.planning.budget import PREFILL_CHUNK
from qmix.planning.device_footprint import on_device
from qmix.planning.footprint import Footprint
from qmix.planning.stored_model import StoredModel
from qmix.weights.blob import READ_BUFFERS
from qmix.weights.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """How many of a model's experts each memory holds; the others stay in the file.

    Attributes:
        device: slots in device memory; 0 on a machine without a GPU.
        host: experts in host memory.
        settings: of the policy.
        persistent: start with the heat of the model's last run, and save this run's for the next.
    """

    device: int
    host: int
    settings: PolicySettings = HEAT
    persistent: bool = False


def schemes(checkpoint: Checkpoint, dtype: torch.dtype) -> frozenset[Scheme]:
    """How the quantized weights of linear layers are stored."""
    model = _stored_model(checkpoint, dtype)
    return frozenset(
        weight.scheme
        for weight in model.weights
        if weight.tensor.linear and weight.scheme.kind != "dense"
    )


def packed_footprint(checkpoint: Checkpoint, dtype: torch.dtype) -> Footprint:
    """What the model takes in a GPU's packed layout."""
    return on_device(_stored_model(checkpoint, dtype))


def _stored_model(checkpoint: Checkpoint, dtype: torch.dtype) -> StoredModel:
    if isinstance(checkpoint, QuantizedCheckpoint):
        return checkpoint.stored_model(dtype)
    return StoredModel.of(checkpoint.metadata, str(dtype).removeprefix("torch."))


def plan_tiers(checkpoint: Checkpoint, options: LoadOptions) -> Tiers | None:
    """The tiers that fit the budgets; None if all experts fit the device.

    Raises:
        ResourceError: the model does not fit the budgets, or the memory that is free.
    """
    gpu = options.device.type == "cuda"
    budgeted = options.vram is not None or options.ram is not None
    positions = checkpoint.config.max_position_embeddings
    dtype = options.dtype or checkpoint.dtype
    planned = plan.plan(
        _stored_model(checkpoint, dtype),
        gpu=gpu,
        vram=options.vram,
        ram=options.ram,
        # Without a budget nothing is promised: only what is short of one prompt chunk is refused.
        context=options.max_context or (None if budgeted else min(PREFILL_CHUNK, positions)),
        batch=options.max_batch,
        kv=options.kv,
    )
    if isinstance(checkpoint, QuantizedCheckpoint) and not planned.resident:
        raise ResourceError(
            "the experts do not all fit, and an expert that is read again would be rounded again",
            where="load_in_4bit",
            remedy="Run qmix quantize once, and load what it writes.",
        )
    vram_free = torch.cuda.mem_get_info(options.device)[0] if gpu else None
    plan.check_memory(planned, vram_free=vram_free)
    if planned.resident:
        return None
    return Tiers(device=planned.slots, host=planned.host, persistent=True)


def blocks_of(modules: Mapping[str, nn.Module]) -> list[SparseMoeBlock]:
    """The experts' blocks of a model, layer by layer."""
    return [module for module in modules.values() if isinstance(module, SparseMoeBlock)]


def offload_to_host(
    blocks: list[SparseMoeBlock],
    reader: ExpertReader,
    tiers: Tiers,
    policy: Policy,
    on_read: Callable[[int], None] = lambda nbytes: None,
) -> DiskStore:
    """Give every block its experts through an arena in host memory over the files.

    Args:
        on_read: called with the bytes of each expert that is in memory.

    Raises:
        ResourceError: the host does not even hold the experts of one token.
    """
    per_layer = len(reader) // len(blocks)
    least = blocks[0].num_experts_per_tok
    if tiers.host < least:
        raise ResourceError(
            "too little host memory for one token's experts",
            expected=f"{least} experts of {reader.blob_bytes / 2**20:.1f} MiB, and {READ_BUFFERS} "
            "buffers",
            found=f"room for {tiers.host}",
            remedy="Give a larger ram.",
        )
    policy.settings = replace(policy.settings, uploads=0)
    reader.cached_share = _cached_share(reader, tiers.host)
    arena = HostArena([reader.blob_bytes] * (tiers.host + READ_BUFFERS))
    store = DiskStore(reader, arena, Residency(len(reader), tiers.host, policy), per_layer)
    for layer, block in enumerate(blocks):
        following = (partial(_expected, each) for each in blocks[layer + 1 : layer + 2])
        block.store(DiskExperts(store, layer, *following))
    store.warm(policy.order(per_layer), on_read)
    return store


@torch.no_grad()
def _expected(block: SparseMoeBlock, x: Tensor) -> list[int]:
    """The experts that a block may choose, likeliest first, by the input [T, D] of the one before.

    What a layer adds is small beside what there is: in trained models the router is right nine
    times in ten (https://arxiv.org/abs/2312.17238), for what does not yet go in.
    """
    if type(block.gate) is not Linear:  # an adapter's
        return []
    logits = kernels.linear(x, block.gate.stored)
    ids = kernels.route(logits, block.num_experts_per_tok).ids
    return list(dict.fromkeys(ids.T.flatten().tolist()))


def _cached_share(reader: ExpertReader, host: int) -> float:
    """The share of the experts in the file for which the page cache has room beside the others."""
    rest = sum(map(reader.file_bytes, range(len(reader)))) * (1 - host / len(reader))
    room = machine.cache_room(beside=host * reader.blob_bytes)
    return min(1.0, room / rest) if rest else 1.0
