"""A prompt's way through the experts of a DeviceStore: layer after layer through borrowed slots.

While one layer is multiplied the next one is copied. A prompt does not change which experts are
hot.
"""

from torch import Tensor

from qmix.experts.arena import SlotArena
from qmix.experts.copiers import PendingCopy
from qmix.experts.gpu_sources import AddressTable, ExpertSources
from qmix.experts.residency import Residency
from qmix.experts.statistics import MovedBytes


class PrefillStream:
    """Copies the experts that have no slot into buffers for two layers, or for one.

    With fewer slots than a layer has experts there are no buffers, and the device reads the host.

    Args:
        layers, per_layer: the number of layers, and E.
        moved: counts the bytes.
    """

    def __init__(
        self,
        sources: ExpertSources,
        slots: SlotArena,
        residency: Residency,
        table: AddressTable,
        moved: MovedBytes,
        *,
        layers: int,
        per_layer: int,
    ) -> None:
        self._sources, self._slots, self._residency = sources, slots, residency
        self._table, self._moved = table, moved
        self._layers, self._per_layer = layers, per_layer
        self.borrowed: tuple[int, ...] = ()
        # Copies under way or done, by layer and expert: the slot, and the copy.
        self._ahead: dict[int, dict[int, tuple[int, PendingCopy]]] = {}
        self._layer = -1  # the layer that the prompt has reached; -1 between prompts

    def starts_at(self, layer: int) -> bool:
        """Whether this layer is the first of a prompt, or of its next chunk."""
        return layer <= self._layer or self._layer < 0

    def begin(self) -> None:
        """A prompt starts: borrow slots as buffers, unless they are still borrowed."""
        self._ahead.clear()
        if self.borrowed:
            return
        halves = min(2, len(self._slots) // self._per_layer)
        self.borrowed = self._residency.borrow(halves * self._per_layer)
        self._table.write()

    def addresses(self, layer: int) -> Tensor:
        """Where the device reads this layer's experts, int64 [1, E]: slots, buffers or the host."""
        self._layer = layer
        halves = len(self.borrowed) // self._per_layer
        if halves:
            self._send(layer, halves)
            if halves > 1 and layer + 1 < self._layers:
                self._send(layer + 1, halves)
        buffered = self._ahead.pop(layer, {})
        row = []
        for expert in self._experts(layer):
            if expert in buffered:
                slot, copy = buffered[expert]
                copy.join()
                row.append(self._slots.address(slot))
            else:
                row.append(self._table.address(expert))
                if not self._residency.in_slot(expert):
                    self._moved.prefill_interconnect += self._sources.nbytes([expert])
        if layer == self._layers - 1:
            self._layer = -1
        return self._table.row(row)

    def end(self) -> bool:
        """The prompt is over: return the borrowed slots. False if there were none."""
        if not self.borrowed:
            return False
        self._residency.return_slots(self.borrowed)
        self.forget()
        return True

    def forget(self) -> None:
        """The prompt was interrupted, and nothing is borrowed any more."""
        self.borrowed, self._ahead, self._layer = (), {}, -1

    def _experts(self, layer: int) -> range:
        return range(layer * self._per_layer, (layer + 1) * self._per_layer)

    def _send(self, layer: int, halves: int) -> None:
        """Start to copy the layer's experts that have no slot into its half of the buffers."""
        if layer in self._ahead:
            return
        first = layer % halves * self._per_layer
        buffers = self.borrowed[first : first + self._per_layer]
        sent: dict[int, tuple[int, PendingCopy]] = {}
        for expert, slot in zip(self._experts(layer), buffers, strict=True):
            if not self._residency.in_slot(expert):
                sent[expert] = slot, self._sources.copy(expert, self._slots.blob(slot))
                self._moved.prefill_interconnect += self._sources.nbytes([expert])
        self._ahead[layer] = sent
