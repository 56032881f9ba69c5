"""Experts in slots of the device's memory, all of them (or as many as fit) in host memory behind.

A table on the device holds each expert's address: its slot, or its pinned blob on the host, which the device
can read. So a miss is right by default, residency never changes the output, and a recorded step never
breaks. Between tokens the host reads which experts were chosen, and lets hot ones take slots: first the
evicted one's address is switched back to the host, then the copy starts behind every step that was asked
for before, and when it has ended, the new address is published.

Where the device cannot read the host's blob (not pinned, or left in the file), every chosen expert is brought
into a slot before its product, and the host waits for the router.

Shape letters: L layers, E experts a layer, T tokens, K chosen experts a token, D hidden width.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol
from weakref import finalize

import torch
from torch import Tensor
from torch.nn import functional as F

from qmix import kernels
from qmix.experts.arena import HostArena, SlotArena
from qmix.experts.miss_path import MissPathSelector
from qmix.experts.residency import Residency, Upload
from qmix.experts.store import STEP_TOKENS, Moved, Statistics, Store, StoredExperts, chosen_ids
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.cpu import packed_moe as host
from qmix.kernels.gpu import packed_matmul
from qmix.weights.expert import Expert

# Writes an expert that is not in host memory into a blob of the device.
Fill = Callable[[int, Tensor], None]


class Ticket(Protocol):
    """A copy that is under way."""

    def done(self) -> bool: ...
    def join(self) -> None:
        """What is asked of the device from now on comes after the copy."""


class Copier(Protocol):
    """Moves bytes between host and device beside the device's work."""

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        """Start a copy behind everything that was asked of the device until now."""

    def write(self, values: Tensor, target: Tensor) -> None:
        """Host values to the device, in order with its work."""

    def read(self, source: Tensor) -> tuple[Tensor, Ticket]:
        """A device tensor's values, on the host when the ticket is done, in order with the device's work."""


class _Event:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def done(self) -> bool:
        ended: bool = self._event.query()  # type: ignore[no-untyped-call]
        return ended

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class CudaCopier:
    """Weights on a stream of their own; tables and logs on the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return _Event(self._stream)

    def write(self, values: Tensor, target: Tensor) -> None:
        target.copy_(values.pin_memory(), non_blocking=True)

    def read(self, source: Tensor) -> tuple[Tensor, Ticket]:
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        return host, _Event(torch.cuda.current_stream(self._device))


class _Done:
    def done(self) -> bool:
        return True

    def join(self) -> None:
        pass


class HostCopier:
    """Where host memory plays the device: everything is done at once."""

    def copy(self, source: Tensor, target: Tensor) -> Ticket:
        target.copy_(source)
        return _Done()

    def write(self, values: Tensor, target: Tensor) -> None:
        target.copy_(values)

    def read(self, source: Tensor) -> tuple[Tensor, Ticket]:
        return source.clone(), _Done()


class DeviceStore(Store):
    """Slots over host memory.

    Args:
        sources: of each expert its blob in host memory; None: it is in the file only.
        addresses: int64 [L, E] on the device.
        in_place: the device can read every source.
        fill: needed where a source is None.
        arena: that the sources lie in; it is unpinned when the store is closed or goes.

    Attributes:
        path: the way of misses that are in host memory.
    """

    def __init__(
        self,
        sources: Sequence[Tensor | None],
        slots: SlotArena,
        residency: Residency,
        addresses: Tensor,
        copier: Copier,
        *,
        in_place: bool,
        fill: Fill | None = None,
        arena: HostArena | None = None,
    ) -> None:
        assert len(sources) == addresses.numel()
        assert not in_place or all(source is not None for source in sources)
        self.slots, self.residency, self.addresses = slots, residency, addresses
        self.in_place, self.path = in_place, MissPathSelector()
        self.layers, self.per_layer = addresses.shape
        self._arena = arena
        if arena is not None:  # registered memory that is unmapped could not be registered again
            finalize(self, arena.unpin).atexit = False
        self._sources, self._copier, self._fill = sources, copier, fill
        self._copies: list[tuple[Upload, Ticket]] = []
        self._logs: deque[tuple[Tensor, Ticket]] = deque()
        self._moved = Moved()
        self._routes: list[Tensor] = []  # of a step that is not recorded
        self._used: list[int] = []  # the same, where the host has waited for them
        self._layer = -1
        self._borrowed: tuple[int, ...] = ()
        self._ahead: dict[int, dict[int, tuple[int, Ticket | None]]] = {}  # by layer, expert
        self._streamed = -1  # layer that a prompt has reached
        self._written: list[int] = []
        self._write_table()

    @property
    def recordable(self) -> bool:
        """Whether a decode step needs nothing from the host: it can be one graph."""
        return self.in_place and self.path.current == "zero-copy"

    def warm(self, order: Sequence[int]) -> int:
        """Start to fill the free slots, in this order; published at token boundaries. Bytes that move."""
        uploads = self.residency.warm(order)
        self._start(uploads)
        return len(uploads) * self.slots.nbytes

    def on_token_end(self) -> None:
        """Between two decode steps: learn, admit, publish. Waits for nothing."""
        uploads: list[Upload] = []
        while self._logs and self._logs[0][1].done():
            used, _ = self._logs.popleft()
            chosen = used.view(self.layers, -1).tolist()
            ids = [layer * self.per_layer + e for layer, row in enumerate(chosen) for e in row]
            before = self.residency.counts.misses
            uploads += self.residency.token(ids)
            missed = (self.residency.counts.misses - before) * self.slots.nbytes
            if self.path.current == "zero-copy":
                self._moved.in_place += missed
        self._return_buffers()
        self._finish()
        self._write_table()
        self._start(uploads)
        self._moved.interconnect += len(uploads) * self.slots.nbytes
        self.path.choose()

    def log(self, routes: Tensor) -> None:
        """A decode step was asked of the device; int [L, ...] will hold its experts, of every row."""
        self._logs.append(self._copier.read(routes))

    def reach(self, layer: int, routes: Routes) -> None:
        """A decode step that is not recorded reaches a layer; the first one is the boundary."""
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

    def fetch_now(self, layer: int, experts: Sequence[int]) -> None:
        """Have all of these in slots for the product that is asked for next.

        Args:
            experts: ids of the layer's experts.
        """
        self._finish(join=True)
        self._used += experts
        for expert in experts:
            upload = self.residency.fetch(expert, experts)
            if upload is not None:
                self._copy(expert, self.slots.blob(upload.slot)).join()
                self._moved.interconnect += self.slots.nbytes
                self.residency.ready(upload)
        self._write_table()

    def stream(self, layer: int) -> Tensor:
        """Addresses int64 [1, E] of a prompt's layer: slots, and buffers that copies go to, or the host."""
        if layer <= self._streamed or self._streamed < 0:
            self._ahead.clear()
            self._end_fetching()
            self._finish(join=True)
            self._borrow_buffers()
        self._streamed = layer
        halves = len(self._borrowed) // self.per_layer
        if halves:
            self._send(layer, halves)
            if halves > 1 and layer + 1 < self.layers:
                self._send(layer + 1, halves)
        buffered = self._ahead.pop(layer, {})
        row = []
        for expert in range(layer * self.per_layer, (layer + 1) * self.per_layer):
            if expert in buffered:
                slot, ticket = buffered[expert]
                if ticket is not None:
                    ticket.join()
                row.append(self.slots.blob(slot).data_ptr())
            else:
                row.append(self._address(expert))
                if self.residency.slot_of_id[expert] < 0:
                    self._moved.prefill_interconnect += self.slots.nbytes
        if layer == self.layers - 1:
            self._streamed = -1
        out = torch.empty(1, self.per_layer, dtype=torch.int64, device=self.addresses.device)
        self._copier.write(torch.tensor([row]), out)
        return out

    def statistics(self) -> Statistics:
        self._end_fetching()
        path = "copy" if not self.in_place else self.path.current
        held = sum(source is not None for source in self._sources)
        return Statistics(
            device_slots=len(self.slots),
            host=held,
            disk=len(self._sources) - held,
            expert_bytes=self.slots.nbytes,
            unpinned_bytes=0 if self._arena is None else self._arena.unpinned_bytes,
            path=path,
            path_switches=self.path.switches,
            **self._moved.fields(self.residency.counts),
        )

    def close(self) -> None:
        for _, ticket in self._copies:
            while not ticket.done():
                time.sleep(0.001)
        if self._arena is not None:
            self._arena.unpin()

    def missed(self, expert: int) -> bool:
        """Whether it lies in no slot."""
        return self.residency.slot_of_id[expert] < 0

    def _address(self, expert: int) -> int:
        slot = self.residency.slot_of_id[expert]
        if slot >= 0:
            return self.slots.blob(slot).data_ptr()
        source = self._sources[expert]
        return source.data_ptr() if self.in_place and source is not None else 0

    def _write_table(self) -> None:
        table = [self._address(expert) for expert in range(len(self._sources))]
        if table != self._written:
            self._copier.write(torch.tensor(table).view(self.addresses.shape), self.addresses)
            self._written = table

    def _copy(self, expert: int, target: Tensor) -> Ticket:
        source = self._sources[expert]
        if source is not None:
            return self._copier.copy(source, target)
        assert self._fill is not None
        self._fill(expert, target)
        return _Done()

    def _start(self, uploads: Sequence[Upload]) -> None:
        """Start copies whose slots nothing reads any more: the table has been written without them."""
        if uploads:
            self._write_table()
        for upload in uploads:
            ticket = self._copy(upload.expert, self.slots.blob(upload.slot))
            self._copies.append((upload, ticket))

    def _finish(self, *, join: bool = False) -> None:
        """Publish copies that have ended; `join` has the device wait for the others, and publishes all."""
        waiting = []
        for upload, ticket in self._copies:
            try:
                ended = ticket.done()
                if join and not ended:
                    ticket.join()
                    ended = True
            except RuntimeError:
                self.residency.failed(upload)
                continue
            if ended:
                self.residency.ready(upload)
            else:
                waiting.append((upload, ticket))
        self._copies = waiting

    def _end_fetching(self) -> None:
        if self._used:
            self.residency.token(self._used)
        self._used = []

    def _borrow_buffers(self) -> None:
        """Buffers for two layers if there are slots, else for one; none: the device reads the host."""
        if self._borrowed:
            return
        halves = min(2, len(self.slots) // self.per_layer)
        self._borrowed = self.residency.borrow(halves * self.per_layer)
        self._write_table()

    def _return_buffers(self) -> None:
        if self._borrowed:
            self.residency.return_slots(self._borrowed)
            self._borrowed, self._ahead, self._streamed = (), {}, -1
            self._moved.prefill_interconnect += self.warm(
                self.residency.policy.order(self.per_layer)
            )

    def _send(self, layer: int, halves: int) -> None:
        """Start to copy what a layer has in no slot into its half of the buffers."""
        if layer in self._ahead:
            return
        first = layer % halves * self.per_layer
        buffers = self._borrowed[first : first + self.per_layer]
        sent: dict[int, tuple[int, Ticket | None]] = {}
        for index in range(self.per_layer):
            expert = layer * self.per_layer + index
            if self.missed(expert):
                slot = buffers[index]
                sent[expert] = slot, self._copy(expert, self.slots.blob(slot))
                self._moved.prefill_interconnect += self.slots.nbytes
        self._ahead[layer] = sent


class DeviceExperts(StoredExperts):
    """One layer of a DeviceStore.

    Args:
        whole: the layer's experts, their blobs and table those of the store.
        parts: their weights at rest.
    """

    def __init__(
        self, store: DeviceStore, layer: int, whole: PackedExperts, parts: Sequence[Expert]
    ) -> None:
        self.store: DeviceStore = store
        super().__init__(parts)
        self._layer, self._whole = layer, whole

    @property
    def packed(self) -> PackedExperts | None:
        """The experts through the store's table, if the device can read all of them there."""
        return self._whole if self.store.in_place else None

    def _forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        if len(x) > STEP_TOKENS:
            streamed = self._whole.through(self.store.stream(self._layer))
            return kernels.packed_experts(x, routes, streamed, act)
        self.store.reach(self._layer, routes)
        if not self.store.in_place:
            first = self._layer * self.store.per_layer
            self.store.fetch_now(self._layer, [first + index for index in chosen_ids(routes)])
        elif self.store.path.current == "cpu" and act is F.silu and not kernels.overridden():
            return self._split(x, routes)
        return kernels.packed_experts(x, routes, self._whole, act)

    def _split(self, x: Tensor, routes: Routes) -> Tensor:
        """Hits on the device, misses on the CPU: activations go down, products come up, weights stay.

        Summed in the order of a token's choices, as the device's kernels do.
        """
        store, chosen = self.store, routes.ids.tolist()
        first = self._layer * store.per_layer
        there = [e for e in range(store.per_layer) if not store.missed(first + e)]
        missed = torch.tensor([[store.missed(first + e) for e in row] for row in chosen])
        out = torch.zeros(*routes.ids.shape, x.shape[1], dtype=torch.float32, device=x.device)
        absent = missed.to(x.device)
        if not bool(missed.all()):
            ids = routes.ids.masked_fill(absent, there[0])
            weights = routes.weights.masked_fill(absent, 0)
            out += packed_matmul.expert_pairs(x, Routes(ids, weights), self._whole)
        if bool(missed.any()):
            begun = time.perf_counter()
            at_host = Routes(routes.ids.cpu(), routes.weights.cpu())
            found, experts = pairs_on_host(x.cpu(), at_host, self._whole, missed)
            store.path.observe("cpu", experts * store.slots.nbytes, time.perf_counter() - begun)
            out[absent] = found.to(x.device)
        return out.sum(1).to(x.dtype)


def pairs_on_host(
    x: Tensor, routes: Routes, weights: PackedExperts, which: Tensor
) -> tuple[Tensor, int]:
    """Products of the pairs [T, K] that `which` marks, on the CPU, from blobs in host memory.

    Returns:
        float32 [pairs, D], each times its weight; and how many experts were read.
    """
    out = torch.zeros(*routes.ids.shape, x.shape[1], dtype=torch.float32)
    experts = torch.unique(routes.ids[which]).tolist()
    for index in experts:
        token, choice = torch.where((routes.ids == index) & which)
        one = Routes(routes.ids[token, choice, None], routes.weights[token, choice, None])
        out[token, choice] = host.experts(x[token], one, weights.packed)
    return out[which], len(experts)
