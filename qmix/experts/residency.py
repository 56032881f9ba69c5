"""Which expert lies in which slot: a state machine that decides, and leaves copying to its caller.

    FREE -> FILLING -> READY -> FILLING (another expert) ...
            |  failed, cancel: FREE        BORROWED <-> FREE (buffers of a prefill)

A slot's generation counts its fillings; what is reported of an earlier one is late and changes
nothing. One thread calls; nothing here waits. Knows no tensors, no bytes, no clock.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from qmix.errors import ResourceError
from qmix.experts.policy import Policy

# Admissions under way, in tokens' worth: a copy that takes longer must not empty the slots.
_TOKENS_IN_FLIGHT = 2


class SlotState(Enum):
    """Of a slot. BORROWED ones serve as buffers and hold no expert."""

    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    BORROWED = "borrowed"


@dataclass(frozen=True)
class Upload:
    """A copy to be made: `expert` into `slot`.

    Attributes:
        generation: of the slot.
        evicted: the expert that lay there until now, -1 if none did. Nothing may read it there any
            more when the copy begins.
    """

    expert: int
    slot: int
    generation: int
    evicted: int = -1


@dataclass
class Counts:
    """What has happened. An expert that a token names twice is one hit or one miss.

    Attributes:
        tokens: decoded.
        hits, misses: of decoded tokens, by where the expert lay when it was asked for.
        warmed, admissions, fetches: copies begun by warm, token and fetch.
        failures: copies that failed. cancelled: copies that were called off.
        late: reports of copies whose slot had gone on without them.
    """

    tokens: int = 0
    hits: int = 0
    misses: int = 0
    warmed: int = 0
    admissions: int = 0
    fetches: int = 0
    failures: int = 0
    cancelled: int = 0
    late: int = 0

    @property
    def copies(self) -> int:
        """Begun in all: each moves one expert's bytes into a slot, and none moves any out."""
        return self.warmed + self.admissions + self.fetches

    @property
    def hit_rate(self) -> float:
        """Hits among the decoded tokens' visits; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)


class Residency:
    """The slots and what they hold.

    Two ways of use. Where a missing expert can be read in place (host memory that the GPU sees), a step
    runs on what is there, and `token` then chooses what moves. Where it cannot (disk), the step calls
    `fetch` for every expert it needs, and `token` or `prefilled` at its end; PolicySettings.uploads
    should be 0 there.

    Attributes:
        slot_of_id: the slot of each expert that is READY, else -1.
        id_of_slot: the expert of each slot that is READY or FILLING, else -1.
        states: of the slots.
        counts: what has happened.
    """

    def __init__(self, experts: int, slots: int, policy: Policy) -> None:
        assert len(policy.heat) == experts, (len(policy.heat), experts)
        assert slots >= 0, slots
        self.policy = policy
        self.slot_of_id = [-1] * experts
        self.id_of_slot = [-1] * slots
        self.states = [SlotState.FREE] * slots
        self.counts = Counts()
        self._generation = [0] * slots
        self._filling: dict[int, Upload] = {}  # by expert
        self._found: dict[int, bool] = {}  # what fetch met since the last token: READY or not

    @property
    def in_flight(self) -> tuple[Upload, ...]:
        """Copies begun and not yet reported, oldest first."""
        return tuple(self._filling.values())

    def in_slot(self, expert: int) -> bool:
        """Whether the expert is READY in a slot."""
        return self.slot_of_id[expert] >= 0

    def warm(self, order: Iterable[int]) -> tuple[Upload, ...]:
        """Fill free slots, with the first of `order` (Policy.order) that have none."""
        free = self._free()
        uploads: list[Upload] = []
        for expert in dict.fromkeys(order):
            if len(uploads) == len(free):
                break
            if self._absent(expert):
                uploads.append(self._fill(expert, free[len(uploads)]))
        self.counts.warmed += len(uploads)
        return tuple(uploads)

    def token(self, used: Sequence[int]) -> tuple[Upload, ...]:
        """A decoded token went through `used`, in this order: count, learn, and admit.

        Admitted are missed experts, hottest first, into free slots, then in place of the lowest key
        that this token did not use, if the score exceeds its by more than the margin; at most
        PolicySettings.uploads of them, fewer while earlier ones are under way. Victims leave `slot_of_id` at
        once. At a token's end call this before `ready`: hits are counted by what the token saw.
        """
        distinct = dict.fromkeys(used)
        ready = [self._found.get(e, self.slot_of_id[e] >= 0) for e in distinct]
        self._found.clear()
        self.policy.used(distinct)
        self.counts.tokens += 1
        self.counts.hits += sum(ready)
        self.counts.misses += len(ready) - sum(ready)
        uploads = self._admit(distinct)
        self.counts.admissions += len(uploads)
        return uploads

    def prefilled(self) -> None:
        """A prompt went by: what it fetched counts as fetches only, and heat stays as it was."""
        self._found.clear()

    def fetch(self, expert: int, needed: Collection[int]) -> Upload | None:
        """A slot for an expert that must be READY before it can be used.

        Args:
            needed: experts that must keep their slots: all of the current step.

        Returns:
            None if it is READY. If it is FILLING already, that copy's Upload once more.

        Raises:
            ResourceError: every slot is needed, lent or being filled.
        """
        self.policy.touch(expert)
        ready = self.slot_of_id[expert] >= 0
        self._found.setdefault(expert, ready)
        if ready:
            return None
        if expert in self._filling:
            return self._filling[expert]
        free = self._free() or self._evictable(needed)[:1]
        if not free:
            raise ResourceError(
                "no slot is left for an expert",
                expected=f"more slots than the {len(set(needed))} experts of one step",
                found=f"{len(self.states)} slots, {len(self._filling)} being filled",
                remedy="Give the experts more memory.",
            )
        self.counts.fetches += 1
        return self._fill(expert, free[0])

    def ready(self, upload: Upload) -> bool:
        """The copy has ended: publish it. False if it came late."""
        if not self._current(upload):
            return False
        del self._filling[upload.expert]
        self.states[upload.slot] = SlotState.READY
        self.slot_of_id[upload.expert] = upload.slot
        return True

    def failed(self, upload: Upload) -> None:
        """The copy has failed: its slot is free again."""
        if self._current(upload):
            self._drop(upload)
            self.counts.failures += 1

    def cancel(self, upload: Upload) -> None:
        """The copy is called off, its slot free at once; whoever copies must not write it any more."""
        if self._current(upload):
            self._drop(upload)
            self.counts.cancelled += 1

    def borrow(self, count: int) -> tuple[int, ...]:
        """Slots as buffers: the free ones first, then those of the lowest keys, which lose their experts.

        Raises:
            ResourceError: fewer than `count` are free or READY.
        """
        slots = (self._free() + self._evictable(()))[:count]
        if len(slots) < count:
            raise ResourceError(
                "too few slots for buffers",
                expected=f"{count}",
                found=f"{len(slots)} of {len(self.states)}",
                remedy="Give the experts more memory.",
            )
        for slot in slots:
            self._evict(slot)
            self.states[slot] = SlotState.BORROWED
        return tuple(slots)

    def return_slots(self, slots: Iterable[int]) -> None:
        """Lent slots are free again; `warm` fills them at once, `token` by and by."""
        for slot in slots:
            assert self.states[slot] is SlotState.BORROWED, (slot, self.states[slot])
            self.states[slot] = SlotState.FREE

    def _admit(self, used: Collection[int]) -> tuple[Upload, ...]:
        settings, policy = self.policy.settings, self.policy
        missed = sorted(filter(self._absent, used), key=policy.key, reverse=True)
        if settings.uploads is not None:
            room = _TOKENS_IN_FLIGHT * settings.uploads - len(self._filling)
            missed = missed[: max(0, min(settings.uploads, room))]
        if not missed:
            return ()
        slots = self._free() + self._evictable(used)
        uploads = []
        for expert, slot in zip(missed, slots, strict=False):
            victim = self.id_of_slot[slot]
            if victim >= 0 and policy.score(expert) <= policy.score(victim) + settings.margin:
                break  # colder candidates and hotter victims follow
            uploads.append(self._fill(expert, slot))
        return tuple(uploads)

    def _free(self) -> list[int]:
        free = SlotState.FREE  # an enum's member is slow to look up 256 times
        return [slot for slot, state in enumerate(self.states) if state is free]

    def _evictable(self, needed: Collection[int]) -> list[int]:
        """READY slots of experts that are not needed, lowest key first."""
        ready = [e for e, slot in enumerate(self.slot_of_id) if slot >= 0 and e not in needed]
        return [self.slot_of_id[expert] for expert in sorted(ready, key=self.policy.key)]

    def _absent(self, expert: int) -> bool:
        return self.slot_of_id[expert] < 0 and expert not in self._filling

    def _fill(self, expert: int, slot: int) -> Upload:
        evicted = self._evict(slot)
        self._generation[slot] += 1
        upload = Upload(expert, slot, self._generation[slot], evicted)
        self.id_of_slot[slot] = expert
        self.states[slot] = SlotState.FILLING
        self._filling[expert] = upload
        return upload

    def _evict(self, slot: int) -> int:
        evicted = self.id_of_slot[slot]
        if evicted >= 0:
            self.slot_of_id[evicted] = -1
            self.id_of_slot[slot] = -1
        return evicted

    def _current(self, upload: Upload) -> bool:
        current = self._filling.get(upload.expert) == upload
        self.counts.late += not current
        return current

    def _drop(self, upload: Upload) -> None:
        del self._filling[upload.expert]
        self.id_of_slot[upload.slot] = -1
        self.states[upload.slot] = SlotState.FREE
