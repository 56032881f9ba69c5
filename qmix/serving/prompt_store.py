"""PromptStore: a folder of texts' caches beside the steps, so that no stream waits for a disk.

One thread reads and one writes, a text at a time. The slots are the queue of what is to be written:
a text that another request overwrites before its turn is not kept. Before writing, what the slot
holds is copied, which takes memory for one text more. Knows no queue of requests.
"""

import time
import warnings
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from qmix.errors import WriteError
from qmix.generation.prompt_cache import LEAST, Found, PromptCache
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.serving.slot import Slot


class PromptStore:
    """What a scheduler asks of a folder; for its thread alone."""

    def __init__(
        self,
        prompts: PromptCache,
        model: MixtralForCausalLM,
        slots: Sequence[Slot],
        wake: Callable[[], None],
    ) -> None:
        """
        Args:
            wake: called in other threads, when `due` may have changed.
        """
        self._prompts, self._model, self._slots, self._wake = prompts, model, slots, wake
        self._kind = model.new_cache(1)  # what such a cache can take
        self._reader = ThreadPoolExecutor(1, "qmix-prompt-reader")
        self._writer = ThreadPoolExecutor(1, "qmix-prompt-writer")
        self._lookups: dict[Slot, Future[Found | None]] = {}
        self._writing: Future[bool] | None = None

    @property
    def due(self) -> bool:
        """Whether `write_next` would do something."""
        return self._next() is not None if self._writing is None else self._writing.done()

    def write_next(self) -> tuple[int, int]:
        """Begin to write the text that has waited for longest, once the last one is written.

        Returns how many texts have been written since the last call, and how many could not be.
        """
        if self._writing is not None and not self._writing.done():
            return 0, 0
        counts = self._written()
        slot = self._next()
        if slot is not None:
            slot.is_kept = True
            ids, copy = slot.held, self._model.new_cache(1, slot.cache.length)
            copy.take(slot.cache, slot.cache.length)
            self._writing = self._writer.submit(self._prompts.store, copy, ids)
            self._writing.add_done_callback(lambda _: self._wake())
        return counts

    def looked_up(self, slot: Slot, ids: "array[int]", held: int, patience_s: float) -> bool:
        """Whether it is known what the folder has of a prompt; the first call asks.

        Args:
            held: positions of it that some slot holds.
            patience_s: how long to wait for the answer.
        """
        lookup = self._lookups.get(slot)
        if lookup is None:
            lookup = self._reader.submit(self._prompts.find, self._kind, ids, held)
            self._lookups[slot] = lookup
        return bool(wait([lookup], patience_s).done)

    def fill(self, slot: Slot, held: int) -> int:
        """Fill a slot's cache with what was found, if that beats what is held; its positions."""
        found = self._lookups.pop(slot).result()
        if found is None or found.length < held + LEAST:
            return 0
        slot.cache.fill(found.length, found.layers)
        return found.length

    def forget(self, slot: Slot) -> None:
        """Its request has ended: nobody waits for the answer."""
        lookup = self._lookups.pop(slot, None)
        if lookup is not None:
            lookup.cancel()

    def close(self, until: float = 0.0) -> None:
        """Write what is due, as long as it is begun before a time (monotonic)."""
        while self._next() is not None and time.monotonic() < until:
            wait([] if self._writing is None else [self._writing])
            self.write_next()
        self._reader.shutdown()
        self._writer.shutdown()
        self._written()

    def _next(self) -> Slot | None:
        waiting = [
            slot
            for slot in self._slots
            if not slot.is_kept and not slot.reading and slot.cache.length >= LEAST
        ]
        return min(waiting, key=lambda slot: slot.used, default=None)

    def _written(self) -> tuple[int, int]:
        """What has come of the last text that was written; see write_next."""
        if self._writing is None:
            return 0, 0
        writing, self._writing = self._writing, None
        try:
            return int(writing.result()), 0
        except WriteError as error:
            warnings.warn(f"a prompt was not kept: {error}", stacklevel=3)
            return 0, 1
