"""Scheduler: which requests run together, step by step; nothing of threads.

A step reads one chunk of one prompt, then decodes one id for every request whose prompt has been
read. So no stream waits longer than for a chunk, and requests join and leave between two ids.
Prompts are read in the order of arrival.

On a CPU the decode steps of a request compute what they compute alone, to the bit, whatever runs
beside it, in as many rows as the model's `exact_rows()` says; where it says more than one, a step
may verify drafts too (decode_pass). Elsewhere a batch rounds otherwise than one row, and so does a
prompt that is read in other chunks, or from where an earlier one had come: ids may differ where two
logits are as good as equal.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qmix.errors import LostDeviceError, QmixError, ResourceError, UsageError, of_device
from qmix.generation.prompt_cache import PromptCache
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.nn.cache_rows import CacheRows
from qmix.nn.cache_slab import only_slab_rows
from qmix.nn.embedding import check_ids
from qmix.quantities import counted
from qmix.serving.beginnings import Beginnings
from qmix.serving.counts import Counts
from qmix.serving.decode_pass import DecodePass
from qmix.serving.limits import Limits
from qmix.serving.prompt_store import PromptStore
from qmix.serving.request import BusyError, Ended, Finish, Ticket
from qmix.serving.running import Running
from qmix.serving.slot import Slot, SlotState
from qmix.text.tokenizer import LlamaTokenizer

_PATIENCE_S = 0.05  # for a folder's answer, where nobody else waits for a token


class Scheduler:
    """Slots, a queue, and the step that moves them.

    `submit` and `admit` change the queue: a caller with several threads calls them under a lock of
    its own. All else is for one thread.
    """

    def __init__(
        self,
        model: MixtralForCausalLM,
        tokenizer: LlamaTokenizer,
        limits: Limits,
        *,
        speculate: bool = True,
        prompts: PromptCache | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            speculate: draft what texts repeat, where that is faster and changes no id.
            prompts: where texts are kept.
            wake: called in another thread, when `idle` may have changed.

        Raises:
            UsageError: a context beyond the model's.
        """
        most = model.config.max_position_embeddings
        if limits.context > most:
            raise UsageError(
                "out of range", where="context", expected=f"16 to {most}", found=limits.context
            )
        self.limits = limits
        self.counts = Counts()
        self._counting = threading.Lock()
        self._model = model
        self._tokenizer = tokenizer
        self._slots = [Slot(cache) for cache in model.new_rows(limits.slots, limits.context)]
        self._pass = DecodePass(model, self._slots, speculate=speculate)
        self._store = None if prompts is None else PromptStore(prompts, model, self._slots, wake)
        self._beginnings = Beginnings(self._slots, self._store)
        self._waiting: deque[Ticket] = deque()
        self._admitted: list[Slot] = []  # slots that run, by arrival
        self._ended = 0
        self._record_steps()

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        is_due = self._store is not None and self._store.due
        return not self._waiting and not self._admitted and not is_due

    @property
    def slots(self) -> tuple[SlotState, ...]:
        """What each slot does. Other threads may ask too: every number is of some moment."""
        return tuple(slot.state for slot in self._slots)

    def check_room(self) -> None:
        """Refuse and count a request that the queue has no room for.

        Raises:
            BusyError: the queue is full.
        """
        if len(self._waiting) >= self.limits.waiting + self._free_slots:
            self._count(refused=1)
            raise BusyError(
                "too many requests are waiting",
                expected=f"at most {self.limits.waiting}",
                remedy="Try again later.",
            )

    def submit(self, ticket: Ticket) -> None:
        """Put a request into the queue.

        Raises:
            BusyError: the queue is full.
            UsageError: a prompt that does not fit the context, or an id outside the vocabulary.
        """
        ids = ticket.ids
        if len(ids) >= self.limits.context:
            raise UsageError(
                "the prompt does not fit the context",
                where="ids",
                expected=f"at most {counted(self.limits.context - 1, 'token')}",
                found=counted(len(ids), "token"),
                remedy="Shorten it, or start the server with a larger context.",
            )
        check_ids(torch.frombuffer(ids, dtype=torch.long), self._model.config.vocab_size)
        self.check_room()
        self._waiting.append(ticket)
        self._count(requests=1, waiting=1)

    def admit(self) -> None:
        """End requests that were left or are overdue; give free slots away, oldest first."""
        self._drop_ended()
        while self._waiting and self._free_slots:
            self._start(self._waiting.popleft())

    def step(self) -> None:
        """Read a chunk of a prompt, then decode an id for every request whose prompt was read.

        Raises:
            LostDeviceError: the device is lost; every request has been told.
        """
        with torch.no_grad():
            self._choose_late()
            self._read_chunk()
            self._decode([slot for slot in self._admitted if slot.decodes])
            if self._store is not None:
                stored, refused = self._store.write_next()
                self._count(stored_prompts=stored, refused_prompts=refused)

    def end_all(self, finish: Finish, error: QmixError | None = None) -> None:
        """End every request that runs or waits."""
        for slot in list(self._admitted):
            self._end(slot, finish, error)
        while self._waiting:
            self._end_waiting(self._waiting.popleft(), finish, error)

    def close(self, until: float = 0.0) -> None:
        """Write texts into the folder that are not there yet, as long as there is time (monotonic).

        No step follows.
        """
        if self._store is not None:
            self._store.close(until)

    def _record_steps(self) -> None:
        """On a GPU, record the step of each number of requests before somebody waits for it."""
        caches = [slot.cache for slot in self._slots]
        if not only_slab_rows(caches):
            return
        for count in range(1, len(caches) + 1):
            rows = CacheRows(caches[:count])
            ids = torch.zeros(count, 1, dtype=torch.long, device=self._model.device)
            self._model.next_logits(ids, rows, None, rows.position_ids())
            for cache in caches:
                cache.rewind(0)

    @property
    def _free_slots(self) -> int:
        return len(self._slots) - len(self._admitted)

    def _drop_ended(self) -> None:
        for ticket in list(self._waiting):
            finish = ticket.early_finish
            if finish is not None:
                self._waiting.remove(ticket)
                self._end_waiting(ticket, finish)
        for slot in list(self._admitted):
            finish = slot.running.ticket.early_finish
            if finish is not None:
                self._end(slot, finish)

    def _start(self, ticket: Ticket) -> None:
        slot = self._beginnings.slot_for(ticket.ids)
        try:
            running = Running(
                ticket, self._tokenizer, context=self.limits.context, device=self._model.device
            )
        except Exception as error:  # noqa: BLE001 - others' requests go on
            self._end_waiting(ticket, "error", _said(error))
            self._count(failed=1)
            self._raise_if_lost(error)
            return
        slot.start(running)
        self._admitted.append(slot)
        self._count(waiting=-1, running=1, prompt_tokens=running.prompt_tokens)

    def _begin(self, slot: Slot) -> bool:
        """Begin a slot's prompt with what is held of it; False where the folder is still asked."""
        idle = not any(other.decodes for other in self._admitted)
        if not self._beginnings.are_known(slot, _PATIENCE_S if idle else 0.0):
            return False
        running = slot.running
        running.cached_tokens, restored = self._beginnings.take(slot)
        slot.begin()
        self._pass.begin(slot)
        self._count(cached_tokens=running.cached_tokens, restored_tokens=restored)
        return True

    def _read_chunk(self) -> None:
        """Read the next chunk of the earliest prompt that has not been read."""
        slot = next((slot for slot in self._admitted if slot.reads), None)
        if slot is None:
            return
        running = slot.running
        try:
            if not slot.reading and not self._begin(slot):
                return
            start = slot.cache.length
            chunk = torch.tensor([running.ids[start : start + self.limits.chunk].tolist()])
            if running.ticket.request.looks_inside:
                logits = self._examined(slot, running, chunk)
            else:
                logits = self._model.next_logits(chunk.to(self._model.device), slot.cache)
            if not slot.unread:
                self._choose(slot, logits)
        except Exception as error:  # noqa: BLE001 - others' requests go on
            self._fail(slot, error)

    def _examined(self, slot: Slot, running: Running, chunk: Tensor) -> Tensor:
        """The last logits (1, V) of a chunk (1, S), of which the request asks for more."""
        start = slot.cache.length
        decoded = self._model.model.decode(
            self._model.model.embed(chunk.to(self._model.device)), cache=slot.cache
        )
        if running.ticket.request.expert_counts and not slot.unread:
            use = decoded.expert_use(self._model.config.num_experts_per_tok)
            running.count_experts(use[:, -1])
        if not running.ticket.request.prompt_logprobs:
            return self._model.logits(decoded.hidden[:, -1])
        logits = self._model.logits(decoded.hidden)[0]
        following = torch.tensor(running.ids[start + 1 : start + 1 + chunk.shape[1]].tolist())
        running.read(following, logits[: len(following)])
        return logits[-1:]

    def _decode(self, slots: Sequence[Slot]) -> None:
        """One id for each of the slots; where the pass fails, for each that does not fail alone."""
        if not slots:
            return
        drafted = self._pass.drafted
        try:
            logits = self._pass.run(slots)
        except Exception as error:  # noqa: BLE001 - others' requests go on
            if len(slots) == 1:
                self._fail(slots[0], error)
                return
            self._raise_if_lost(error)
            for slot in slots:
                self._decode([slot])
            return
        self._count(decode_steps=1, drafted_tokens=self._pass.drafted - drafted)
        for slot, row in zip(slots, logits, strict=True):
            self._choose(slot, row)

    def _choose_late(self) -> None:
        """Choose an id where a mask has become ready; wait for one if there is nothing else."""
        late = [slot for slot in self._admitted if slot.late is not None]
        if late and len(late) == len(self._admitted):
            late[0].running.wait()
        for slot in late:
            row, slot.late = slot.late, None
            assert row is not None
            self._choose(slot, row)

    def _choose(self, slot: Slot, logits: Tensor) -> None:
        """Choose an id for a slot from logits (1, V), and further ones from those of a draft.

        Ends it if that is the end. Where the mask is not ready, the logits wait for it, and the
        others do not.
        """
        running = slot.running
        following: Tensor | None = logits
        while following is not None:
            if not running.ready:
                slot.late = following.clone()
                return
            try:
                finish = running.choose(following)
            except Exception as error:  # noqa: BLE001 - a processor is the caller's code
                self._fail(slot, error)
                return
            self._count(new_tokens=1)
            if finish is not None:
                self._end(slot, finish)
                return
            following = slot.go_on(running.ids[-1])
            self._count(accepted_tokens=int(following is not None))

    def _fail(self, slot: Slot, error: Exception) -> None:
        """End one request with its error; what its cache holds may be in pieces.

        Raises:
            LostDeviceError: the device is lost.
        """
        slot.cache.rewind(0)
        self._end(slot, "error", _said(error))
        self._count(failed=1)
        self._raise_if_lost(error)

    def _raise_if_lost(self, error: Exception) -> None:
        lost = of_device(error) if isinstance(error, RuntimeError) else error
        if isinstance(lost, LostDeviceError):
            self.end_all("error", lost)
            raise lost from error

    def _end(self, slot: Slot, finish: Finish, error: QmixError | None = None) -> None:
        running = slot.running
        self._ended += 1
        if self._store is not None:
            self._store.forget(slot)
        slot.free(self._ended)
        self._admitted.remove(slot)
        self._count(running=-1, cancelled=int(finish == "cancelled"))
        running.ticket.tell(running.ended(finish, error))

    def _end_waiting(self, ticket: Ticket, finish: Finish, error: QmixError | None = None) -> None:
        self._count(waiting=-1, cancelled=int(finish == "cancelled"))
        ticket.tell(
            Ended(
                finish=finish,
                error=error,
                prompt_tokens=len(ticket.ids),
                waited_s=ticket.age_s,
                elapsed_s=ticket.age_s,
            )
        )

    def _count(self, **changes: int) -> None:
        with self._counting:  # requests arrive in other threads than the steps'
            now = self.counts
            self.counts = replace(now, **{n: getattr(now, n) + by for n, by in changes.items()})


def _said(error: Exception) -> QmixError:
    """What the caller is told of an error."""
    if isinstance(error, QmixError):
        return error
    if isinstance(error, MemoryError):
        return ResourceError("the server has no memory left for this request")
    failure = of_device(error) if isinstance(error, RuntimeError) else None
    return failure or QmixError(str(error)[:400] or type(error).__name__)
