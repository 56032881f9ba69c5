"""Which expert is in which slot: a state machine that decides, and leaves copying to its caller.

    FREE -> FILLING -> READY -> FILLING (another expert) ...
            |  failed: FREE             BORROWED <-> FREE (buffers of a prefill)

A slot's generation counts its fillings. A report about an earlier filling is late, and changes
nothing. Calls come from one thread at a time, and none waits. Knows no tensors, no bytes and no
clock.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from qmix.errors import ResourceError
from qmix.experts.policy import Policy

# The most admissions under way, in tokens' worth: slow copies must not empty the slots.
_TOKENS_IN_FLIGHT = 2


class SlotState(Enum):
    """The state of a slot. A BORROWED slot serves as a buffer and holds no expert."""

    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    BORROWED = "borrowed"


@dataclass(frozen=True)
class Upload:
    """A copy to be made: `expert` into `slot`.

    Attributes:
        generation: of the slot.
        evicted: the expert that was in the slot until now; -1 if none was. When the copy begins,
            nothing may read that expert there any more.
    """

    expert: int
    slot: int
    generation: int
    evicted: int = -1


@dataclass
class Counts:
    """Counters. An expert that a token names twice counts as one hit or one miss.

    Attributes:
        tokens: decoded tokens.
        hits, misses: experts of decoded tokens, by whether they were READY when they were needed.
        warmed, admissions, fetches: copies that `warm`, `token` and `fetch` started.
        failures: copies that failed.
        late: reports about copies whose slot has been filled again since.
    """

    tokens: int = 0
    hits: int = 0
    misses: int = 0
    warmed: int = 0
    admissions: int = 0
    fetches: int = 0
    failures: int = 0
    late: int = 0


class Residency:
    """The slots and the experts in them.

    There are two ways to use it. If a missing expert can be read in place (in host memory that the
    GPU can read), a step runs without it, and `token` then decides which experts are copied. If it
    cannot (on a disk), the step calls `fetch` for every expert that it needs, and `token` at its
    end; PolicySettings.uploads should then be 0.

    Attributes:
        slot_of_id: the slot of each expert that is READY, else -1.
        id_of_slot: the expert of each slot that is READY or FILLING, else -1.
        states: the state of each slot.
        counts: what has happened so far.
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
        # Whether each expert was READY at its first fetch since the last token.
        self._fetched_ready: dict[int, bool] = {}

    def in_slot(self, expert: int) -> bool:
        """Whether the expert is READY in a slot."""
        return self.slot_of_id[expert] >= 0

    def warm(self, order: Iterable[int]) -> tuple[Upload, ...]:
        """Fill the free slots with the first experts of `order` (Policy.order) that have none."""
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
        """A decoded token used these experts, in this order: count it, update heat, admit experts.

        Missed experts are admitted, hottest first: into free slots, then in place of the expert
        with the lowest key that this token did not use, if the score exceeds that expert's by more
        than the margin. At most PolicySettings.uploads are admitted, and fewer while earlier copies
        are under way. Evicted experts leave `slot_of_id` at once. At the end of a token call this
        before `ready`, so that hits are counted by what the token met.
        """
        distinct = dict.fromkeys(used)
        ready = [self._fetched_ready.get(e, self.in_slot(e)) for e in distinct]
        self._fetched_ready.clear()
        self.policy.used(distinct)
        self.counts.tokens += 1
        self.counts.hits += sum(ready)
        self.counts.misses += len(ready) - sum(ready)
        uploads = self._admit(distinct)
        self.counts.admissions += len(uploads)
        return uploads

    def fetch(self, expert: int, needed: Collection[int]) -> Upload | None:
        """Find a slot for an expert that must be READY before it can be used.

        Args:
            needed: experts that must keep their slots: all those of the current step.

        Returns:
            the copy to be made, which may already be under way; None if the expert is READY.

        Raises:
            ResourceError: every slot is needed, borrowed or being filled.
        """
        self.policy.touch(expert)
        ready = self.in_slot(expert)
        self._fetched_ready.setdefault(expert, ready)
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
        """The copy has ended: publish the expert. False if the report is late."""
        if not self._current(upload):
            return False
        del self._filling[upload.expert]
        self.states[upload.slot] = SlotState.READY
        self.slot_of_id[upload.expert] = upload.slot
        return True

    def failed(self, upload: Upload) -> None:
        """The copy has failed: its slot is free again."""
        if self._current(upload):
            del self._filling[upload.expert]
            self.id_of_slot[upload.slot] = -1
            self.states[upload.slot] = SlotState.FREE
            self.counts.failures += 1

    def repair(self) -> None:
        """Bring the slots into order after an interruption, which may have come at any point.

        No copy is under way any more, or its report will be late, and no slot is borrowed. A slot
        stays READY if it and its expert know each other; otherwise it is free.
        """
        self._filling.clear()
        self._fetched_ready.clear()
        for slot, expert in enumerate(self.id_of_slot):
            known = expert >= 0 and self.slot_of_id[expert] == slot
            if self.states[slot] is not SlotState.READY or not known:
                self.id_of_slot[slot], self.states[slot] = -1, SlotState.FREE
        for expert, slot in enumerate(self.slot_of_id):
            if slot >= 0 and self.id_of_slot[slot] != expert:
                self.slot_of_id[expert] = -1

    def borrow(self, count: int) -> tuple[int, ...]:
        """Take slots as buffers: free ones first, then those of the experts with the lowest keys,
        which are evicted.

        Raises:
            ResourceError: fewer than `count` slots are free or READY.
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
        """Borrowed slots are free again; `warm` fills them at once, `token` little by little."""
        for slot in slots:
            assert self.states[slot] is SlotState.BORROWED, (slot, self.states[slot])
            self.states[slot] = SlotState.FREE

    def _admit(self, used: Collection[int]) -> tuple[Upload, ...]:
        settings, policy = self.policy.settings, self.policy
        missed = sorted(filter(self._absent, used), key=policy.key, reverse=True)
        if settings.uploads is not None:
            more_in_flight = _TOKENS_IN_FLIGHT * settings.uploads - len(self._filling)
            missed = missed[: max(0, min(settings.uploads, more_in_flight))]
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
        free = SlotState.FREE  # looking up a member of an enum is slow, 256 times
        return [slot for slot, state in enumerate(self.states) if state is free]

    def _evictable(self, needed: Collection[int]) -> list[int]:
        """The READY slots of experts that are not needed, lowest key first."""
        ready = [e for e, slot in enumerate(self.slot_of_id) if slot >= 0 and e not in needed]
        return [self.slot_of_id[expert] for expert in sorted(ready, key=self.policy.key)]

    def _absent(self, expert: int) -> bool:
        return not self.in_slot(expert) and expert not in self._filling

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
