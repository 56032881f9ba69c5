"""Slot: a KV cache that outlives its request, so that the next one may start from what it holds.

Knows no model and no queue.
"""

from array import array
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qmix.generation.drafted_text import DraftedText
from qmix.nn.cache import KVCache
from qmix.serving.running import Running
from qmix.text.common_prefix import common_prefix

_LEAST_REUSED = 8  # positions


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """What a slot does, without a word of any text.

    Attributes:
        held_tokens: positions of its cache.
        prompt_tokens, new_tokens: of the request that runs; 0 if none does.
    """

    state: Literal["free", "reading", "writing"]
    held_tokens: int
    prompt_tokens: int = 0
    new_tokens: int = 0


class Slot:
    """A cache of one row, and the request that fills it.

    Attributes:
        reading: whether the cache is the request's; before, it still is that of the last one.
        late: logits (1, V) of the next id, which wait for the request's mask; None: none do.
        drafts: of its request; None: none are made for it.
        is_kept: whether what the cache holds was given to a folder, or is not worth it.
        used: a counter of the scheduler's when its last request ended; 0: never used.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._running: Running | None = None
        self.reading = False
        self.late: Tensor | None = None
        self.drafts: DraftedText | None = None
        self.is_kept = True
        self.used = 0
        self._held = array("q")

    @property
    def is_free(self) -> bool:
        """Whether it has no request."""
        return self._running is None

    @property
    def running(self) -> Running:
        """Its request; it must have one."""
        assert self._running is not None
        return self._running

    @property
    def held(self) -> "array[int]":
        """The ids of the cache's positions."""
        if not self.is_free and self.reading:
            return self.running.ids[: self.cache.length]
        return self._held[: self.cache.length]

    @property
    def state(self) -> SlotState:
        """What it does at this moment."""
        running, held = self._running, self.cache.length
        if running is None:
            return SlotState(state="free", held_tokens=held)
        return SlotState(
            state="writing" if running.new_tokens else "reading",
            held_tokens=held,
            prompt_tokens=running.prompt_tokens,
            new_tokens=running.new_tokens,
        )

    @property
    def unread(self) -> int:
        """Ids of its request that the cache does not hold: 1 where it decodes."""
        return 0 if self.is_free else len(self.running.ids) - self.cache.length

    @property
    def reads(self) -> bool:
        """Whether its prompt has not been read."""
        return not self.is_free and not self.running.new_tokens and self.late is None

    @property
    def decodes(self) -> bool:
        """Whether its newest id is to be read."""
        return not self.is_free and bool(self.running.new_tokens) and self.late is None

    def reusable(self, ids: "array[int]") -> int:
        """Positions of the cache that a request with these ids may start from.

        One id at least is left to be read: its logits choose the first new id. A full ring that a
        draft has written into can give nothing. So few positions as any two prompts share (the
        begin token, "[INST]") are read anew: they save nothing, and a prompt that is read in other
        pieces rounds otherwise.
        """
        if self.drafts is not None and self.drafts.verified and self.cache.window is not None:
            return 0
        common = common_prefix(ids, self.held)
        if common < _LEAST_REUSED:
            return 0
        return self.cache.longest_rewindable(min(common, len(ids) - 1))

    def start(self, running: Running) -> None:
        """Give it to a request."""
        self._running = running
        self.reading = False

    def go_on(self, newest: int) -> Tensor | None:
        """Its request has chosen an id: the logits (1, V) after it, if a draft gave them."""
        return None if self.drafts is None else self.drafts.put(newest)

    def begin(self) -> None:
        """Let the cache be its request's."""
        self.reading, self.is_kept = True, True

    def free(self, used: int) -> None:
        """Take it from its request; the cache keeps what it holds."""
        if self.drafts is not None:
            self.drafts.drop()
        self.drafts = None
        self._held = self.held
        if self.reading:
            self.is_kept = False
        self._running = None
        self.reading = False
        self.late = None
        self.used = used
