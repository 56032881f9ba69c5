"""From a number of experts in each tier to stores that hold them, and to a model over the stores.

Knows modules by their names and their blocks' `store`; how many fit where is the plan's (qmix.planning.plan).
"""

import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor, nn

from qmix.errors import CheckpointError, ResourceError, UnsupportedError
from qmix.experts import disk_store, heat_file
from qmix.experts.arena import HostArena, SlotArena
from qmix.experts.copiers import CudaCopier, HostCopier
from qmix.experts.cpu_misses import pairs_on_host
from qmix.experts.disk_store import DiskStore
from qmix.experts.gpu_experts import DeviceExperts
from qmix.experts.gpu_store import DeviceStore
from qmix.experts.policy import HEAT, Policy, PolicySettings
from qmix.experts.reader import ExpertReader
from qmix.experts.residency import Residency
from qmix.formats import Checkpoint
from qmix.kernels import PackedExperts, Routes
from qmix.models.options import LoadOptions
from qmix.nn.moe import SparseMoeBlock
from qmix.planning import machine, plan
from qmix.weights.packed.layout import pack_expert


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """How many of a model's experts fit where; those that fit nowhere stay in the file.

    Attributes:
        device: slots in device memory; 0 on a machine without a GPU.
        host: in host memory.
        settings: of the policy.
        remembers: start with the heat of the model's last run, and keep this one's for the next.
    """

    device: int
    host: int
    settings: PolicySettings = HEAT
    remembers: bool = False


class HeatRecord:
    """The policy of a model's experts, as hot as its last run left them, and kept for its next.

    The heat file lies in the user's cache directory, by the routers' fingerprint; it is written when the
    store goes, if any token was decoded. It decides what is loaded first, and no output.
    """

    def __init__(self, checkpoint: Checkpoint, tiers: Tiers) -> None:
        config = checkpoint.config
        self._count = config.num_hidden_layers * config.num_local_experts
        self._path: Path | None = None
        known = None
        if tiers.remembers:
            names = (t.name for t in checkpoint.tensors if t.kind == "router")
            bits = (checkpoint.read(name).view(torch.uint8).numpy().tobytes() for name in names)
            self._model = heat_file.fingerprint(bits)
            folder = machine.measurements_path().parent / "heat"
            self._path = folder / f"{self._model[:16]}.json"
            known = heat_file.read_if_good(self._path, experts=self._count, model=self._model)
        self.policy = Policy(self._count, tiers.settings, heat=known)

    def keep(self, store: DiskStore | DeviceStore) -> None:
        """Write the heat file when the store goes, or Python ends."""
        if self._path is not None:
            finalize(store, _save, self._path, self._model, store.residency)


def _save(path: Path, model: str, residency: Residency) -> None:
    if not residency.counts.tokens:
        return
    try:
        heat_file.save(path, residency.policy.heat, model=model)
    except CheckpointError as error:
        warnings.warn(f"{error} The next run starts without it.", stacklevel=2)


def planned(checkpoint: Checkpoint, options: LoadOptions) -> Tiers | None:
    """The tiers that fit the budgets; None if all experts fit the device.

    Raises:
        ResourceError: the model does not fit the budgets, or the memory that is free.
    """
    gpu = options.device.type == "cuda"
    budgeted = options.vram is not None or options.ram is not None
    positions = checkpoint.config.max_position_embeddings
    found = plan.plan(
        checkpoint.metadata,
        gpu=gpu,
        vram=options.vram,
        ram=options.ram,
        # Without a budget nothing is promised: only what is short of one prompt chunk is refused.
        context=options.max_context or (None if budgeted else min(512, positions)),
        dtype=str(options.dtype or checkpoint.dtype).removeprefix("torch."),
    )
    plan.check_memory(found, vram_free=torch.cuda.mem_get_info(options.device)[0] if gpu else None)
    return None if found.resident else Tiers(device=found.slots, host=found.host, remembers=True)


def blocks_of(modules: Mapping[str, nn.Module]) -> list[SparseMoeBlock]:
    """The experts' blocks of a model, layer by layer."""
    return [module for module in modules.values() if isinstance(module, SparseMoeBlock)]


def on_the_host(
    blocks: list[SparseMoeBlock], reader: ExpertReader, tiers: Tiers, policy: Policy
) -> DiskStore:
    """Give every block its experts through an arena in host memory over the files.

    Raises:
        ResourceError: not even the experts of one token fit.
    """
    per_layer = len(reader) // len(blocks)
    least = blocks[0].num_experts_per_tok
    if tiers.host < least:
        raise ResourceError(
            "too little host memory for one token's experts",
            expected=f"{least} experts of {reader.blob_bytes / 2**20:.1f} MiB, and {disk_store.BUFFERS} buffers",
            found=f"room for {tiers.host}",
            remedy="Give a larger ram.",
        )
    policy.settings = replace(policy.settings, uploads=0)
    arena = HostArena(tiers.host + disk_store.BUFFERS, reader.blob_bytes)
    store = DiskStore(reader, arena, Residency(len(reader), tiers.host, policy), per_layer)
    for index, block in enumerate(blocks):
        block.store(store.layer(index))
    store.warm(policy.order(per_layer))
    return store


class OnDevice:
    """Takes layer after layer, brought into the packed layout, from the device to host memory; then makes the store.

    Between the two at most one layer lies on the device whole.

    Args:
        reader: gives the experts that do not fit host memory, again and again.
        policy: says which to keep, and which to warm.
        device: with slots; host memory plays it where it is the CPU.
    """

    def __init__(
        self,
        reader: ExpertReader,
        layers: int,
        tiers: Tiers,
        policy: Policy,
        device: torch.device,
    ) -> None:
        self._reader, self._tiers, self._device = reader, tiers, device
        self._layers, self._per_layer = layers, len(reader) // layers
        self._policy = policy
        kept = self._policy.order(self._per_layer)[: tiers.host]
        self._place = {expert: index for index, expert in enumerate(kept)}
        self._arena: HostArena | None = None
        self._sources: list[Tensor | None] = [None] * len(reader)
        self._packed: list[PackedExperts] = []

    def take(self, block: SparseMoeBlock) -> None:
        """The next layer's experts to host memory. Their room on the device is free when this returns.

        Raises:
            UnsupportedError: they are not in the packed layout, or of another size than the others.
            ResourceError: no host memory.
        """
        experts = block.stored.packed
        if experts is None:
            raise UnsupportedError(
                "experts that are not in the packed layout are not offloaded from a GPU",
                where=f"layer {len(self._packed)}",
                found=str(block.stored[0].w1.scheme),
                remedy="Load it with device='cpu' and ram=, or quantize it as NF4 or GPTQ.",
            )
        sizes = {len(expert.blob) for expert in experts.packed}
        if self._arena is None:
            self._arena = HostArena(len(self._place), max(sizes))
            cuda = self._device.type == "cuda"
            if cuda and not self._arena.pin(torch.cuda.cudart()):  # type: ignore[no-untyped-call]
                # The error stays in CUDA's runtime until a launch reports it: let it be this one.
                with suppress(RuntimeError):
                    torch.zeros(1, device=self._device).add_(1)
        if sizes != {self._arena.nbytes}:
            raise UnsupportedError(
                "experts of several sizes are not offloaded from a GPU",
                where=f"layer {len(self._packed)}",
                expected=f"{self._arena.nbytes} B",
                found=", ".join(map(str, sorted(sizes))),
                remedy="Load it with device='cpu' and ram=, or quantize all experts alike.",
            )
        first = len(self._packed) * self._per_layer
        blobs = []
        for index, expert in enumerate(experts.packed):
            place = self._place.get(first + index)
            source = None if place is None else self._arena.blob(place).copy_(expert.blob)
            self._sources[first + index] = source
            blobs.append(torch.empty(0, dtype=torch.uint8) if source is None else source)
        none = torch.zeros(1, self._per_layer, dtype=torch.int64, device=self._device)
        self._packed.append(experts.elsewhere(blobs, none))
        block.release()

    def finish(self, blocks: list[SparseMoeBlock]) -> DeviceStore:
        """Slots, the address table, and the blocks' experts behind both; the hottest are on their way.

        Raises:
            ResourceError: too few slots where misses cannot be read in place.
        """
        assert self._arena is not None
        cuda = self._device.type == "cuda"
        in_place = len(self._place) == len(self._sources) and (not cuda or self._arena.pinned)
        slots = self._tiers.device
        if not in_place and slots < self._per_layer:
            raise ResourceError(
                "too few slots in device memory",
                expected=f"{self._per_layer}, a layer's experts, where host memory holds too few or is not pinned",
                found=slots,
                remedy="Give a larger vram, or a larger ram.",
            )
        if not in_place:
            self._policy.settings = replace(self._policy.settings, uploads=0)
        if cuda:
            torch.cuda.empty_cache()
        count, size = len(self._sources), self._arena.nbytes
        store = DeviceStore(
            self._sources,
            SlotArena(slots, size, self._device),
            Residency(count, slots, self._policy),
            torch.zeros(self._layers, self._per_layer, dtype=torch.int64, device=self._device),
            CudaCopier(self._device) if cuda else HostCopier(),
            in_place=in_place,
            fill=self._fill,
            arena=self._arena,
        )
        for index, (block, packed) in enumerate(zip(blocks, self._packed, strict=True)):
            first = index * self._per_layer
            whole = packed.through(store.addresses[index : index + 1])
            parts = [
                self._reader.described(first + i) if self._sources[first + i] is None else whole[i]
                for i in range(self._per_layer)
            ]
            block.store(DeviceExperts(store, index, whole, parts))
        begun = time.perf_counter()
        moved = store.warm(self._policy.order(self._per_layer))
        if cuda:
            torch.cuda.synchronize(self._device)
            store.path.observe("zero-copy", moved, time.perf_counter() - begun)
            if in_place:
                self._measure(store)
        store.on_token_end()
        return store

    def _fill(self, expert: int, target: Tensor) -> None:
        """An expert from its file into device memory, in the packed layout."""
        standard = self._reader.load(expert)
        there = type(standard)(
            *(w.to(self._device) for w in (standard.w1, standard.w2, standard.w3))
        )
        target.copy_(pack_expert(there).blob)

    def _measure(self, store: DeviceStore) -> None:
        """How fast the CPU multiplies an expert where it lies; the second of two, on warm threads."""
        whole = self._packed[0]
        x = torch.ones(1, whole.table.shape[1])
        routes = Routes(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        which = torch.ones(1, 1, dtype=torch.bool)
        for _ in range(2):
            begun = time.perf_counter()
            pairs_on_host(x, routes, whole, which)
            seconds = time.perf_counter() - begun
        store.path.observe("cpu", store.slots.nbytes, seconds)
