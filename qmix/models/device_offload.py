"""Moves a GPU model's experts to host memory, layer after layer, and makes their store.

At no time is more than one layer's experts on the device beside the slots.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qmix.errors import ResourceError, UnsupportedError
from qmix.experts import cuda_memory
from qmix.experts.arena import HostArena, SlotArena
from qmix.experts.copiers import CudaCopier, HostCopier
from qmix.experts.cpu_misses import pairs_on_host
from qmix.experts.gpu_experts import DeviceExperts
from qmix.experts.gpu_store import DeviceStore
from qmix.experts.policy import Policy
from qmix.experts.reader import ExpertReader
from qmix.experts.residency import Residency
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.cpu import packed_moe
from qmix.models.offload import Tiers
from qmix.nn.moe import SparseMoeBlock
from qmix.weights.expert import Expert
from qmix.weights.packed.layout import pack_expert


class DeviceOffload:
    """Takes the layers in turn, each in the packed layout, then makes the store.

    Args:
        reader: reads the experts that do not fit host memory, whenever they are needed.
        layers: how many there are.
        sizes: bytes of each expert in the packed layout.
        policy: decides which experts host memory keeps, and which start in slots.
        device: holds the slots; on the CPU, host memory stands in for it.
    """

    def __init__(
        self,
        reader: ExpertReader,
        layers: int,
        sizes: Sequence[int],
        tiers: Tiers,
        policy: Policy,
        device: torch.device,
    ) -> None:
        self._reader, self._tiers, self._device = reader, tiers, device
        self._sizes = sizes
        self._layers, self._per_layer = layers, len(reader) // layers
        self._policy = policy
        hottest = policy.order(self._per_layer)[: tiers.host]
        self._blob_of = {expert: index for index, expert in enumerate(hottest)}
        self._arena: HostArena | None = None
        self._blobs: list[Tensor | None] = [None] * len(reader)
        self._packed: list[PackedExperts] = []

    @property
    def _cuda(self) -> bool:
        return self._device.type == "cuda"

    def take(self, block: SparseMoeBlock) -> None:
        """Move the next layer's experts to host memory, and free their device memory.

        Raises:
            UnsupportedError: they are not in the packed layout.
            ResourceError: there is too little host memory.
        """
        experts = block.stored.packed
        if experts is None:
            raise UnsupportedError(
                "slots hold experts in the packed layout only",
                where=f"layer {len(self._packed)}",
                found=str(block.stored[0].w1.scheme),
            )
        if self._arena is None:
            self._arena = self._pinned(HostArena([self._sizes[each] for each in self._blob_of]))
        first = len(self._packed) * self._per_layer
        blobs = []
        for expert, packed in enumerate(experts.packed, first):
            assert len(packed.blob) == self._sizes[expert], (len(packed.blob), expert)
            index = self._blob_of.get(expert)
            blob = None if index is None else self._arena.blob(index).copy_(packed.blob)
            self._blobs[expert] = blob
            blobs.append(torch.empty(0, dtype=torch.uint8) if blob is None else blob)
        no_addresses = torch.zeros(1, self._per_layer, dtype=torch.int64, device=self._device)
        self._packed.append(experts.moved_to(blobs, no_addresses))
        block.release()

    def finish(self, blocks: list[SparseMoeBlock]) -> DeviceStore:
        """Make the store, give each block its experts through it, and start to fill the slots.

        Raises:
            ResourceError: there are too few slots, and misses cannot be read in place.
        """
        assert self._arena is not None
        all_on_host = len(self._blob_of) == len(self._blobs)
        in_place = all_on_host and (self._arena.pinned or not self._cuda)
        if not in_place and self._tiers.device < self._per_layer:
            raise ResourceError(
                "too few slots in device memory",
                expected=f"{self._per_layer}, the experts of a layer, where host memory holds too "
                "few or is not pinned",
                found=self._tiers.device,
                remedy="Give a larger vram, or a larger ram.",
            )
        if not in_place:
            self._policy.settings = replace(self._policy.settings, uploads=0)
        store = self._store(self._arena, in_place=in_place)
        for layer, (block, packed) in enumerate(zip(blocks, self._packed, strict=True)):
            experts = packed.with_addresses(store.addresses[layer : layer + 1])
            block.store(DeviceExperts(store, layer, experts, self._at_rest(layer, experts)))
        begun = time.perf_counter()
        moved = store.warm(self._policy.order(self._per_layer))
        if self._cuda:
            torch.cuda.synchronize(self._device)
            store.path.observe("zero-copy", moved, time.perf_counter() - begun)
            if in_place:
                self._measure_cpu(store)
        store.on_token_end()
        return store

    def _pinned(self, arena: HostArena) -> HostArena:
        if self._cuda:
            cuda_memory.pin(arena, self._device)
        return arena

    def _store(self, arena: HostArena, *, in_place: bool) -> DeviceStore:
        if self._cuda:
            torch.cuda.empty_cache()
        slots = self._tiers.device
        return DeviceStore(
            self._blobs,
            SlotArena(slots, max(self._sizes), self._device),
            Residency(len(self._blobs), slots, self._policy),
            torch.zeros(self._layers, self._per_layer, dtype=torch.int64, device=self._device),
            CudaCopier(self._device) if self._cuda else HostCopier(),
            in_place=in_place,
            sizes=self._sizes,
            fill=self._fill,
            arena=arena,
            host_addresses=self._host_addresses(arena) if in_place else None,
        )

    def _host_addresses(self, arena: HostArena) -> list[int]:
        """Where the device reads each expert in host memory."""
        return [arena.device_address(self._blob_of[expert]) for expert in range(len(self._blobs))]

    def _at_rest(self, layer: int, experts: PackedExperts) -> list[Expert]:
        """The layer's weights as they are described and saved: from the host, or else the file."""
        first = layer * self._per_layer
        return [
            self._reader.described(first + index) if self._blobs[first + index] is None else expert
            for index, expert in enumerate(experts)
        ]

    def _fill(self, expert: int, target: Tensor) -> None:
        """Read an expert from its file into device memory, in the packed layout."""
        standard = self._reader.load(expert)
        w1, w2, w3 = (w.to(self._device) for w in (standard.w1, standard.w2, standard.w3))
        target.copy_(pack_expert(Expert(w1=w1, w2=w2, w3=w3)).blob)

    def _measure_cpu(self, store: DeviceStore) -> None:
        """Time how fast the CPU multiplies a host blob; the second of two runs, on warm threads.

        Not where it has to unpack one of them: then misses are never left to it.
        """
        experts = self._packed[0]
        if not all(packed_moe.is_compiled(each) for layer in self._packed for each in layer.packed):
            return
        x = torch.ones(1, experts.table.shape[1])
        routes = Routes(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        chosen = torch.ones(1, 1, dtype=torch.bool)
        for _ in range(2):
            begun = time.perf_counter()
            pairs_on_host(x, routes, experts, chosen)
            seconds = time.perf_counter() - begun
        store.path.observe("cpu", self._sizes[0], seconds)
