"""Experts that do not fit host memory, without a GPU: slots over the checkpoint's files.

Threads read a decode step's experts into slots while those that are there are multiplied. A prompt
streams the missing experts through two buffers that hold nothing else, and leaves the slots as they
are. In a decode step those buffers take the experts that the next layer is expected to choose: one
that it does choose becomes its slot's, and gives the slot's own blob in return, so that a guess
never takes the place of an expert. All reads are preads into the arena, never page faults of a
mapped file. Of kernels it knows what they say of a weight.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property

from qmix import kernels
from qmix.experts.arena import HostArena
from qmix.experts.blob_reads import BlobReads
from qmix.experts.foresight import Foresight
from qmix.experts.reader import ExpertReader
from qmix.experts.residency import Residency, Upload
from qmix.experts.statistics import MovedBytes, Statistics
from qmix.experts.store import Store
from qmix.weights.blob import READ_BUFFERS
from qmix.weights.expert import Expert


class DiskStore(Store):
    """As many experts in host memory as fit, and the others in their file.

    Args:
        arena: a blob for each slot of the residency, and READ_BUFFERS more for prompts.
        residency: with PolicySettings.uploads 0, so that nothing moves but what a step needs.
        per_layer: E.

    Attributes:
        looks_ahead: whether expected experts are read, where `reads_ahead` has a use for them.
    """

    def __init__(
        self, reader: ExpertReader, arena: HostArena, residency: Residency, per_layer: int
    ) -> None:
        super().__init__()
        slots = len(residency.id_of_slot)
        assert len(arena) == slots + READ_BUFFERS, (len(arena), slots)
        assert residency.policy.settings.uploads == 0
        self.reader, self.arena = reader, arena
        self.residency, self.per_layer = residency, per_layer
        self._in_slots: list[Expert | None] = [None] * slots
        self._blobs = list(range(slots + READ_BUFFERS))  # of each slot, then of each buffer
        self._reads: dict[int, tuple[Upload, Future[Expert]]] = {}  # into slots, by expert
        self._ahead: dict[int, tuple[int, Future[Expert]]] = {}  # into buffers, by expert
        self._expected: frozenset[int] = frozenset()  # of the layer that comes next
        self._foresight = Foresight()
        self.looks_ahead = True
        self._blob_reads = BlobReads(reader.read, arena)
        self._moved = MovedBytes()
        self.failures = 0  # of reads into buffers
        self._used: list[int] = []  # by the token under way
        self._layer = -1  # the layer that this token has reached

    @cached_property
    def tokens_as_alone(self) -> int:
        """See kernels.tokens_as_alone, of every expert's weights. A weight of each kind is read."""
        return min(map(kernels.tokens_as_alone, self.reader.kinds()))

    def warm(
        self, order: Iterable[int], on_read: Callable[[int], None] = lambda nbytes: None
    ) -> None:
        """Fill the free slots with the first experts of `order`.

        Args:
            on_read: called with the bytes of each.

        Raises:
            CheckpointError: the files are damaged.
        """
        uploads = self.residency.warm(order)
        reads = [(upload, self._read(upload)) for upload in uploads]
        try:
            for upload, read in reads:
                self._in_slots[upload.slot] = read.result()
                self.residency.ready(upload)
                on_read(self.reader.file_bytes(upload.expert))
        finally:
            for _, read in reads:
                read.cancel()

    def reach(self, layer: int, experts: Sequence[int]) -> None:
        """A decode step reaches a layer and uses these experts, by their ids over all layers.

        A layer that does not follow the last one begins the next step.
        """
        if layer <= self._layer:
            self.end_token()
        self._layer = layer
        self._used += experts

    def end_token(self) -> None:
        """The step under way is over: count it."""
        if self._used:
            self.residency.token(self._used)
        self._used, self._layer = [], -1

    def start_reads(self, experts: Collection[int]) -> None:
        """Start to read the missing ones of a decode step's experts in one layer into slots.

        There may be at most as many experts as slots.
        """
        needed = set(experts)
        self._foresight.seen(self._expected, needed)
        self._expected = frozenset()
        for expert in experts:
            upload = self.residency.fetch(expert, needed)
            if upload is not None and expert not in self._reads:
                self._reads[expert] = upload, self._taken(upload) or self._read(upload)
                self._moved.disk += self.reader.file_bytes(expert)
        self.forget_ahead()

    @property
    def reads_ahead(self) -> bool:
        """Whether `read_ahead` has a use for what is expected.

        Only past the page cache: a copy out of it takes the cores from the layer under way.
        """
        return self.looks_ahead and self.reader.cached_share < 1

    def read_ahead(self, expected: Collection[int]) -> None:
        """Start to read what is missing of the experts that the next layer may choose.

        Args:
            expected: the likeliest first.
        """
        assert not self._ahead
        self._expected = frozenset(expected)
        if not self._foresight.pays:
            return
        slots = len(self._in_slots)
        missing = [
            e for e in expected if self.reader.is_past_cache(e) and not self.residency.in_slot(e)
        ]
        for buffer, expert in enumerate(missing[:READ_BUFFERS], slots):
            self._ahead[expert] = buffer, self._blob_reads.start(expert, self._blobs[buffer])

    def forget_ahead(self) -> None:
        """Nobody wants what is being read ahead; whether it failed nobody will know."""
        for buffer, _ in self._ahead.values():
            self._blob_reads.drop(self._blobs[buffer])
        self._foresight.dropped += len(self._ahead)
        self._ahead.clear()

    def _taken(self, upload: Upload) -> Future[Expert] | None:
        """The read ahead of an expert that is needed, whose blob becomes the slot's; or None."""
        buffer, read = self._ahead.pop(upload.expert, (-1, None))
        if read is not None:
            blobs = self._blobs
            blobs[upload.slot], blobs[buffer] = blobs[buffer], blobs[upload.slot]
            self._foresight.taken += 1
        return read

    def expert(self, expert: int) -> Expert:
        """An expert that is in a slot, or is being read into one: waits for it.

        Raises:
            CheckpointError: it could not be read; its slot is free again.
        """
        if expert in self._reads:
            self._finish_read(expert)
        slot = self.residency.slot_of_id[expert]
        weights = self._in_slots[slot] if slot >= 0 else None
        assert weights is not None, expert
        return weights

    def read_into_buffer(self, expert: int, index: int, *, prompt: bool) -> Future[Expert]:
        """Start to read an expert into a buffer, whose last expert is no longer needed.

        Args:
            prompt: whether the bytes count as a prompt's.
        """
        read = self._blob_reads.start(expert, self._blobs[len(self._in_slots) + index])
        if prompt:
            self._moved.prefill_disk += self.reader.file_bytes(expert)
        else:
            self._moved.disk += self.reader.file_bytes(expert)
        return read

    def _statistics(self) -> Statistics:
        self.end_token()
        slots = len(self._in_slots)
        return Statistics(
            device_slots=0,
            host=slots,
            disk=len(self.reader) - slots,
            expert_bytes=self.arena.nbytes,
            path="disk",
            ahead=self._foresight.taken,
            dropped=self._foresight.dropped,
            **self._moved.fields(self.residency.counts, self.failures),
        )

    def _read(self, upload: Upload) -> Future[Expert]:
        return self._blob_reads.start(upload.expert, self._blobs[upload.slot])

    def _finish_read(self, expert: int) -> None:
        """Wait for a read and publish it. If the wait is interrupted, the read goes on."""
        upload, read = self._reads[expert]
        try:
            weights = read.result()
        except Exception:
            del self._reads[expert]
            self.residency.failed(upload)
            raise
        del self._reads[expert]
        self._in_slots[upload.slot] = weights
        self.residency.ready(upload)

    def _begin_step(self, whole: bool) -> None:
        if whole:
            return
        self.forget_ahead()
        self._expected = frozenset()
        for expert in list(self._reads):
            with suppress(Exception):  # counted; read again where it is needed
                self._finish_read(expert)
        self.residency.repair()
        self._used, self._layer = [], -1
