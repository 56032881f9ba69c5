"""Beginnings: what of a prompt need not be computed, because a slot or a folder holds it.

Knows no model and no queue.
"""

from array import array
from collections.abc import Sequence

from qmix.serving.prompt_store import PromptStore
from qmix.serving.slot import Slot


class Beginnings:
    """The slots of a scheduler and, if there is one, the folder of texts."""

    def __init__(self, slots: Sequence[Slot], store: PromptStore | None) -> None:
        self._slots, self._store = slots, store

    def slot_for(self, ids: "array[int]") -> Slot:
        """The free slot that the prompt goes on from, or else the one unused for longest.

        A slot that holds far more than the prompt belongs to another conversation, which may come
        back: the prompt then takes a copy.
        """
        free = [slot for slot in self._slots if slot.is_free]
        best = max(free, key=lambda slot: slot.reusable(ids))
        if 2 * best.reusable(ids) > len(best.held):
            return best
        return min(free, key=lambda slot: slot.used)

    def are_known(self, slot: Slot, patience_s: float) -> bool:
        """Whether `take` would not wait for the folder.

        Args:
            patience_s: how long to wait for its answer here.
        """
        if self._store is None or not _shares(slot):
            return True
        ids = _ids(slot)
        held = self._source(slot).reusable(ids)
        return self._store.looked_up(slot, ids, held, patience_s)

    def take(self, slot: Slot) -> tuple[int, int]:
        """Fill a slot's cache with the longest beginning of its request's prompt.

        Returns its positions, and how many of them came from the folder: all or none.
        """
        source, held = slot, 0
        if _shares(slot):
            source = self._source(slot)
            held = source.reusable(_ids(slot))
            restored = 0 if self._store is None else self._store.fill(slot, held)
            if restored:
                return restored, restored
        if source is not slot:
            slot.cache.take(source.cache, held)
        slot.cache.rewind(held)
        return held, 0

    def _source(self, slot: Slot) -> Slot:
        """The slot that holds most of a prompt; the prompt's own where others hold no more."""
        ids = _ids(slot)
        return max(self._slots, key=lambda other: (other.reusable(ids), other is slot))


def _ids(slot: Slot) -> "array[int]":
    """The prompt of a slot's request."""
    return slot.running.ticket.ids


def _shares(slot: Slot) -> bool:
    """Whether a prompt may be taken from elsewhere: not if its own logits are wanted."""
    return not slot.running.ticket.request.prompt_logprobs
