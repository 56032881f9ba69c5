"""Experts that do not fit host memory: an arena of blobs over the checkpoint's files.

The tier of a machine without a GPU. A decode step's experts are read into slots of the arena, on threads,
while what is there is multiplied; a prompt streams what is missing through two blobs that hold nothing
else, and leaves the slots alone. Reads are preads into the arena: never a page fault of a mapped file.

Shape letters: T tokens, E experts a layer. Knows no kernels.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from torch import Tensor

from qmix import kernels
from qmix.experts.arena import HostArena
from qmix.experts.reader import ExpertReader
from qmix.experts.residency import Residency, Upload
from qmix.experts.store import (
    MovedBytes,
    Statistics,
    Store,
    StoredExperts,
    chosen_ids,
)
from qmix.kernels import Routes
from qmix.kernels.moe import DECODE_TOKENS
from qmix.weights.blob import READ_BUFFERS
from qmix.weights.expert import Expert, ExpertSequence

# Of a layer's two chosen experts one is multiplied while the other is read. One thread or two made no
# difference beyond the scatter where it was measured (8x7B, 4 GiB, most of the file in the page cache).
_THREADS = 2


class DiskStore(Store):
    """As many experts in host memory as fit, the others in their file.

    Args:
        arena: a blob for each slot of the residency, and two more for prompts.
        residency: with PolicySettings.uploads 0: nothing moves but what a step asks for.
        per_layer: E.
    """

    def __init__(
        self, reader: ExpertReader, arena: HostArena, residency: Residency, per_layer: int
    ) -> None:
        self.reader, self.arena, self.residency, self.per_layer = (
            reader,
            arena,
            residency,
            per_layer,
        )
        slots = len(residency.id_of_slot)
        assert len(arena) == slots + READ_BUFFERS, (len(arena), slots)
        assert residency.policy.settings.uploads == 0
        self._held: list[Expert | None] = [None] * slots
        self._reads: dict[int, tuple[Upload, Future[Expert]]] = {}  # by expert
        self._buffers: list[Future[Expert] | None] = [None] * READ_BUFFERS
        self._pool = ThreadPoolExecutor(_THREADS, "qmix-read")
        self._moved = MovedBytes()
        self.failures = 0  # of reads into buffers
        self._used: list[int] = []  # of the token under way
        self._layer = -1  # that it has reached

    def layer(self, index: int) -> "DiskExperts":
        """The experts of one layer."""
        return DiskExperts(self, index)

    def warm(
        self, order: Iterable[int], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> None:
        """Fill the free slots, in this order.

        Raises:
            CheckpointError: the files are damaged.
        """
        uploads = self.residency.warm(order)
        reads = [(u, self._pool.submit(self.reader.read, u.expert, self._blob(u))) for u in uploads]
        try:
            for done, (upload, read) in enumerate(reads):
                self._held[upload.slot] = read.result()
                self.residency.ready(upload)
                progress(done + 1, len(reads))
        finally:
            for _, read in reads:
                read.cancel()

    def hold(self, experts: Sequence[int]) -> None:
        """Start to read what is missing of a decode step's experts in one layer.

        At most as many as there are slots; those that `expert` was not asked for are read to their end first.
        """
        needed = set(experts)
        for other in [e for e in self._reads if e not in needed]:  # of a step that was interrupted
            self._settle(other)
        for expert in experts:
            upload = self.residency.fetch(expert, needed)
            if upload is not None and expert not in self._reads:
                read = self._pool.submit(self.reader.read, expert, self._blob(upload))
                self._reads[expert] = upload, read
                self._moved.disk += self.reader.file_bytes(expert)

    def expert(self, expert: int) -> Expert:
        """One of those that were held, when it is there.

        Raises:
            CheckpointError: it could not be read; its slot is free again.
        """
        if expert in self._reads:
            self._settle(expert)
        slot = self.residency.slot_of_id[expert]
        held = self._held[slot] if slot >= 0 else None
        assert held is not None, expert
        return held

    def begin(self, layer: int) -> None:
        """A decode step reaches a layer; a step that begins ends the one before it."""
        if layer <= self._layer:
            self.end()
        self._layer = layer

    def use(self, experts: Iterable[int]) -> None:
        """The step under way goes through these."""
        self._used += experts

    def end(self) -> None:
        """The step under way is over: count it."""
        if self._used:
            self.residency.token(self._used)
        self._used, self._layer = [], -1

    def buffer(self, expert: int, index: int, *, prompt: bool) -> Future[Expert]:
        """Start to read an expert into a buffer, whose content is not needed any more."""
        previous = self._buffers[index]
        if previous is not None:
            wait([previous])  # of a prompt that was interrupted
        blob = self.arena.blob(len(self._held) + index)
        read = self._pool.submit(self.reader.read, expert, blob)
        self._buffers[index] = read
        if prompt:
            self._moved.prefill_disk += self.reader.file_bytes(expert)
        else:
            self._moved.disk += self.reader.file_bytes(expert)
        return read

    def statistics(self) -> Statistics:
        self.end()
        return Statistics(
            device_slots=0,
            host=len(self._held),
            disk=len(self.reader) - len(self._held),
            expert_bytes=self.arena.nbytes,
            path="disk",
            **self._moved.fields(self.residency.counts, self.failures),
        )

    def close(self) -> None:
        self._pool.shutdown()

    def _blob(self, upload: Upload) -> Tensor:
        return self.arena.blob(upload.slot)

    def _settle(self, expert: int) -> None:
        """Wait for a read and publish it. If the wait is interrupted the read stays under way."""
        upload, read = self._reads[expert]
        try:
            found = read.result()
        except Exception:
            del self._reads[expert]
            self.residency.failed(upload)
            raise
        del self._reads[expert]
        self._held[upload.slot] = found
        self.residency.ready(upload)


class DiskExperts(StoredExperts):
    """One layer of a DiskStore."""

    store: DiskStore

    def __init__(self, store: DiskStore, layer: int) -> None:
        self.store, self._layer = store, layer
        self._first = layer * store.per_layer
        super().__init__([store.reader.described(self._first + i) for i in range(store.per_layer)])

    def _forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        return kernels.experts(x, routes, self._view(routes), act, resident=False)

    def _view(self, routes: Routes) -> "_View":
        """The layer's experts for one product, whose reads begin here."""
        store, ids = self.store, [self._first + index for index in chosen_ids(routes)]
        if len(routes.ids) > DECODE_TOKENS:
            store.end()
            return _Passing(self, self._first, ids, prompt=True)
        store.begin(self._layer)
        store.use(ids)
        if len(ids) > len(store.residency.id_of_slot):  # many rows, few slots
            return _Passing(self, self._first, ids, prompt=False)
        store.hold(ids)
        return _Held(self, self._first, ids)


class _View(ExpertSequence):
    """A layer's experts for one product; those that nobody chose as they are at rest."""

    def __init__(self, layer: DiskExperts, first: int, chosen: Sequence[int]) -> None:
        self._layer, self._store = layer, layer.store
        self._first, self._chosen = first, frozenset(chosen)

    def __len__(self) -> int:
        return len(self._layer)

    def expert(self, index: int) -> Expert:
        expert = self._first + index
        return self._loaded(expert) if expert in self._chosen else self._layer[index]

    @abstractmethod
    def _loaded(self, expert: int) -> Expert:
        """A chosen expert, by its id over all layers, when its weights are in memory."""


class _Held(_View):
    """All chosen ones have a slot."""

    def _loaded(self, expert: int) -> Expert:
        return self._store.expert(expert)


class _Passing(_View):
    """Those in slots where they lie, the others through two buffers, one read ahead of the product.

    Must be indexed in ascending order; an expert's blob is written again when the next is asked for.
    """

    def __init__(
        self, layer: DiskExperts, first: int, chosen: Sequence[int], *, prompt: bool
    ) -> None:
        super().__init__(layer, first, chosen)
        self._prompt = prompt
        self._missing = [e for e in chosen if not self._store.residency.in_slot(e)]
        self._next = 0
        self._reads: dict[int, Future[Expert]] = {}
        for _ in range(READ_BUFFERS):
            self._read_ahead()

    def _loaded(self, expert: int) -> Expert:
        if expert not in self._missing:
            return self._store.expert(expert)
        if self._missing.index(expert) + 1 == self._next and self._next >= READ_BUFFERS:
            self._read_ahead()  # into the buffer whose product has just ended
        try:
            return self._reads[expert].result()
        except Exception:
            self._store.failures += 1
            raise

    def _read_ahead(self) -> None:
        if self._next < len(self._missing):
            expert = self._missing[self._next]
            self._reads[expert] = self._store.buffer(
                expert, self._next % READ_BUFFERS, prompt=self._prompt
            )
            self._next += 1
