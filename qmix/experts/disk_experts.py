"""One layer of a DiskStore, and how one product sees it: from slots, or through buffers."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from torch import Tensor

from qmix import kernels
from qmix.experts.disk_store import DiskStore
from qmix.experts.store import StoredExperts, chosen_ids
from qmix.kernels import Routes
from qmix.kernels.moe import DECODE_TOKENS
from qmix.weights.blob import READ_BUFFERS
from qmix.weights.expert import Expert, ExpertSequence

Expect = Callable[[Tensor], Sequence[int]]


def _nothing(x: Tensor) -> Sequence[int]:
    """Expect no experts."""
    return ()


class DiskExperts(StoredExperts):
    """One layer of a DiskStore.

    Args:
        expect: the experts that the next layer may choose, likeliest first, by what comes into this
            one [T, D]; by their numbers in their layer.
    """

    store: DiskStore

    def __init__(self, store: DiskStore, layer: int, expect: Expect = _nothing) -> None:
        self.store, self._layer, self._expect = store, layer, expect
        self._first = layer * store.per_layer
        super().__init__([store.reader.described(self._first + i) for i in range(store.per_layer)])

    def _forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        """The CPU multiplies, also for a model whose other layers are on a GPU."""
        here = Routes(routes.ids.cpu(), routes.weights.cpu())
        view = self._view(here)
        if isinstance(view, _FromSlots) and self.store.reads_ahead:
            following = self._first + self.store.per_layer
            self.store.read_ahead([following + index for index in self._expect(x)])
        out = kernels.experts(x.cpu(), here, view, act, resident=False)
        return out.to(x.device)

    def _view(self, routes: Routes) -> "_View":
        """The layer's experts for one product. The reads that it needs start here."""
        store, chosen = self.store, [self._first + index for index in chosen_ids(routes)]
        if len(routes.ids) > DECODE_TOKENS:
            store.forget_ahead()
            store.end_token()
            return _ThroughBuffers(self, self._first, chosen, prompt=True)
        store.reach(self._layer, chosen)
        if len(chosen) > len(store.residency.id_of_slot):  # many rows, few slots
            store.forget_ahead()
            return _ThroughBuffers(self, self._first, chosen, prompt=False)
        store.start_reads(chosen)
        return _FromSlots(self, self._first, chosen)


class _View(ExpertSequence):
    """A layer's experts for one product: chosen ones in memory, the others at rest."""

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


class _FromSlots(_View):
    """Every chosen expert has a slot."""

    def _loaded(self, expert: int) -> Expert:
        return self._store.expert(expert)


class _ThroughBuffers(_View):
    """Experts in slots are used there; the others pass through buffers, one read ahead.

    It must be indexed in ascending order: asking for an expert lets an earlier one's buffer be
    overwritten.
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
            self._reads[expert] = self._store.read_into_buffer(
                expert, self._next % READ_BUFFERS, prompt=self._prompt
            )
            self._next += 1
