"""One layer of a DeviceStore: the packed experts behind the store's address table."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional as F

from qmix import kernels
from qmix.experts import cpu_misses
from qmix.experts.gpu_store import DeviceStore
from qmix.experts.store import StoredExperts, chosen_ids
from qmix.kernels import PackedExperts, Routes
from qmix.kernels.moe import DECODE_TOKENS
from qmix.weights.expert import Expert


class DeviceExperts(StoredExperts):
    """One layer of a DeviceStore.

    Args:
        through_table: the layer's experts; their blobs and their table are the store's.
        at_rest: their weights, as they are described and saved.
    """

    def __init__(
        self,
        store: DeviceStore,
        layer: int,
        through_table: PackedExperts,
        at_rest: Sequence[Expert],
    ) -> None:
        self.store: DeviceStore = store
        super().__init__(at_rest)
        self._layer, self._through_table = layer, through_table

    @property
    def packed(self) -> PackedExperts | None:
        """The experts through the store's table, if the device can read all of them there."""
        return self._through_table if self.store.in_place else None

    def _forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        store = self.store
        if len(x) > DECODE_TOKENS:
            streamed = self._through_table.with_addresses(store.stream(self._layer))
            return kernels.packed_experts(x, routes, streamed, act)
        store.reach(self._layer, routes)
        first = self._layer * store.per_layer
        if not store.in_place:
            store.fetch_now([first + index for index in chosen_ids(routes)])
        elif store.path.current == "cpu" and act is F.silu and not kernels.overridden():
            in_slot = [store.residency.in_slot(first + e) for e in range(store.per_layer)]
            split = cpu_misses.forward(x, routes, self._through_table, in_slot)
            missed = store.nbytes(first + expert for expert in split.missed)
            store.path.observe("cpu", missed, split.seconds)
            return split.out
        return kernels.packed_experts(x, routes, self._through_table, act)
