"""Experts in slots of the device's memory, with all of them, or as many as fit, in host memory.

A table on the device holds each expert's address: its slot, or its pinned blob on the host, which
the device can read. A miss is therefore always correct, residency never changes the output, and a
recorded
step stays valid. Between tokens the host reads which experts were chosen and admits hot ones to
slots: it switches the evicted expert's address back to the host, starts the copy behind every step
enqueued so far, and publishes the new address when the copy has ended.

Where the device cannot read the host's blob (not pinned, or only in the file), every chosen expert
is copied into a slot before it is multiplied, and the host waits for the router.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from weakref import finalize

import torch
from torch import Tensor

from qmix.experts.arena import HostArena, SlotArena
from qmix.experts.copiers import Copier, PendingCopy
from qmix.experts.gpu_sources import AddressTable, ExpertSources, Fill
from qmix.experts.miss_path import MissPathSelector
from qmix.experts.prefill_stream import PrefillStream
from qmix.experts.residency import Residency, Upload
from qmix.experts.statistics import MovedBytes, Statistics
from qmix.experts.store import Store
from qmix.kernels import Routes


class DeviceStore(Store):
    """Slots over host memory.

    Experts may differ in size; a slot holds the largest.

    Args:
        blobs: each expert's blob in host memory; None if it is only in the file.
        sizes: bytes of each expert; None: those of a slot.
        addresses: int64 [layers, E] on the device.
        in_place: the device can read every blob.
        fill: writes an expert from its file into a slot; needed if a blob is None.
        arena: the memory of the blobs; it is unpinned when the store is collected.
        host_addresses: where the device reads each blob; None: where the host does.

    Attributes:
        path: how misses that are in host memory are served.
    """

    def __init__(
        self,
        blobs: Sequence[Tensor | None],
        slots: SlotArena,
        residency: Residency,
        addresses: Tensor,
        copier: Copier,
        *,
        in_place: bool,
        sizes: Sequence[int] | None = None,
        fill: Fill | None = None,
        arena: HostArena | None = None,
        host_addresses: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        assert not in_place or None not in blobs
        self.slots, self.residency, self.in_place = slots, residency, in_place
        self.path = MissPathSelector()
        self.layers, self.per_layer = addresses.shape
        self._arena = arena
        if arena is not None:  # registered memory that is unmapped could not be registered again
            finalize(self, arena.unpin).atexit = False
        self._copier = copier
        sizes = [slots.nbytes] * len(blobs) if sizes is None else sizes
        assert max(sizes) <= slots.nbytes
        self._sources = ExpertSources(blobs, sizes, copier, fill)
        if host_addresses is None:
            host_addresses = [0 if blob is None else blob.data_ptr() for blob in blobs]
        self._table = AddressTable(
            addresses, host_addresses if in_place else None, slots, residency, copier
        )
        self._moved = MovedBytes()
        self._prefill = PrefillStream(
            self._sources,
            slots,
            residency,
            self._table,
            self._moved,
            layers=self.layers,
            per_layer=self.per_layer,
        )
        self._copies: list[tuple[Upload, PendingCopy]] = []
        self._logs: deque[tuple[Tensor, PendingCopy]] = deque()
        self._routes: list[Tensor] = []  # of the step under way, if it is not recorded
        self._used: list[int] = []  # the same, where the host waits for the router
        self._layer = -1  # the layer that this step has reached

    @property
    def addresses(self) -> Tensor:
        """The device's table, int64 [layers, E]."""
        return self._table.addresses

    @property
    def recordable(self) -> bool:
        """Whether a decode step needs nothing from the host, so that it can be one CUDA graph."""
        return self.in_place and self.path.current == "zero-copy"

    def warm(self, order: Sequence[int]) -> int:
        """Start to fill the free slots with the first experts of `order`; the bytes that move.

        The copies are published by `on_token_end`.
        """
        uploads = self.residency.warm(order)
        self._start(uploads)
        return self.nbytes(upload.expert for upload in uploads)

    def nbytes(self, experts: Iterable[int]) -> int:
        """The bytes of experts, by their ids over all layers."""
        return self._sources.nbytes(experts)

    def on_token_end(self) -> None:
        """Between two decode steps: update heat, admit experts, publish copies. Never waits."""
        uploads: list[Upload] = []
        while self._logs and self._logs[0][1].done():
            routes, _ = self._logs.popleft()
            chosen = routes.view(self.layers, -1).tolist()
            ids = [layer * self.per_layer + e for layer, row in enumerate(chosen) for e in row]
            if self.path.current == "zero-copy":
                missed = (e for e in dict.fromkeys(ids) if not self.residency.in_slot(e))
                self._moved.in_place += self.nbytes(missed)
            uploads += self.residency.token(ids)
        if self._prefill.end():
            order = self.residency.policy.order(self.per_layer)
            self._moved.prefill_interconnect += self.warm(order)
        self._finish()
        self._table.write()
        self._start(uploads)
        self._moved.interconnect += self.nbytes(upload.expert for upload in uploads)
        self.path.choose()

    def log(self, routes: Tensor) -> None:
        """A decode step was enqueued; int [layers, ...] will hold the experts that it chose."""
        self._logs.append(self._copier.read(routes))

    def reach(self, layer: int, routes: Routes) -> None:
        """A step that is not recorded reaches a layer; the first layer ends the last token."""
        if layer <= self._layer:
            self._routes.clear()
            self._end_fetching()
        if layer == 0:
            self.on_token_end()
        self._layer = layer
        if self.in_place:
            self._routes.append(routes.ids)
            if len(self._routes) == self.layers:
                self.log(torch.stack(self._routes))

    def fetch_now(self, experts: Sequence[int]) -> None:
        """Put experts, by their ids over all layers, into slots before they are multiplied.

        Raises:
            ResourceError: there are fewer slots than experts.
        """
        self._finish(join=True)
        self._used += experts
        for expert in experts:
            upload = self.residency.fetch(expert, experts)
            if upload is not None:
                self._sources.copy(expert, self.slots.blob(upload.slot)).join()
                self._moved.interconnect += self.nbytes([expert])
                self.residency.ready(upload)
        self._table.write()

    def stream(self, layer: int) -> Tensor:
        """Where the device reads the experts of a prompt's layer, int64 [1, E]."""
        if self._prefill.starts_at(layer):
            self._end_fetching()
            self._finish(join=True)
            self._prefill.begin()
        return self._prefill.addresses(layer)

    def _statistics(self) -> Statistics:
        self._end_fetching()
        on_host = self._sources.on_host
        return Statistics(
            device_slots=len(self.slots),
            host=on_host,
            disk=len(self._sources) - on_host,
            expert_bytes=self.slots.nbytes,
            unpinned_bytes=0 if self._arena is None else self._arena.unpinned_bytes,
            path=self.path.current if self.in_place else "copy",
            path_switches=self.path.switches,
            **self._moved.fields(self.residency.counts),
        )

    def _begin_step(self, whole: bool) -> None:
        self._copier.follow()
        if whole:
            return
        self._finish(join=True)
        self._prefill.forget()
        self.residency.repair()
        self._routes, self._used, self._layer = [], [], -1
        self._table.write()

    def _start(self, uploads: Sequence[Upload]) -> None:
        """Start copies into slots that nothing reads: the table is written without them."""
        if uploads:
            self._table.write()
        for upload in uploads:
            copy = self._sources.copy(upload.expert, self.slots.blob(upload.slot))
            self._copies.append((upload, copy))

    def _finish(self, *, join: bool = False) -> None:
        """Publish the copies that have ended; with `join` the device waits for the others, too."""
        pending = []
        for upload, copy in self._copies:
            try:
                ended = copy.done()
                if join and not ended:
                    copy.join()
                    ended = True
            except RuntimeError:
                self.residency.failed(upload)
                continue
            if ended:
                self.residency.ready(upload)
            else:
                pending.append((upload, copy))
        self._copies = pending

    def _end_fetching(self) -> None:
        """Count the step whose experts `fetch_now` fetched."""
        if self._used:
            self.residency.token(self._used)
        self._used = []
