"""Engine: a scheduler in a thread of its own, and the door through which other threads reach it.

Knows neither HTTP nor the steps of a schedule.
"""

import threading
import time

from qmix.errors import QmixError, UsageError
from qmix.generation.prompt_cache import PromptCache
from qmix.models.causal_lm import MixtralForCausalLM
from qmix.serving.counts import Counts
from qmix.serving.limits import Limits
from qmix.serving.request import BusyError, Listener, Request, Ticket
from qmix.serving.scheduler import Scheduler
from qmix.serving.slot import SlotState
from qmix.text.tokenizer import LlamaTokenizer

DRAIN_S = 10.0  # how long `close` lets requests go on


class Engine:
    """Runs requests of many threads on one model, until it is closed.

    Attributes:
        failure: what ended the engine, if something did; every request has been told.
    """

    def __init__(
        self,
        model: MixtralForCausalLM,
        tokenizer: LlamaTokenizer,
        limits: Limits,
        *,
        speculate: bool = True,
        prompts: PromptCache | None = None,
    ) -> None:
        """
        Args:
            speculate, prompts: see Scheduler.

        Raises:
            UsageError: a context beyond the model's.
        """
        self.failure: QmixError | None = None
        self._changed = threading.Condition()
        self._scheduler = Scheduler(
            model, tokenizer, limits, speculate=speculate, prompts=prompts, wake=self._wake
        )
        self._closing_at: float | None = None  # monotonic; requests end then
        self._thread = threading.Thread(target=self._run, name="qmix-engine", daemon=True)
        self._thread.start()

    @property
    def limits(self) -> Limits:
        return self._scheduler.limits

    @property
    def counts(self) -> Counts:
        """What has happened so far."""
        return self._scheduler.counts

    @property
    def slots(self) -> tuple[SlotState, ...]:
        """What each slot does."""
        return self._scheduler.slots

    @property
    def healthy(self) -> bool:
        """Whether it takes requests."""
        return self.failure is None and self._closing_at is None and self._thread.is_alive()

    def check_room(self) -> None:
        """Refuse a request before it is prepared.

        Raises:
            BusyError: the queue is full, or the engine is closing or has failed.
        """
        with self._changed:
            self._check_healthy()
            self._scheduler.check_room()

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queue a request. The listener gets its events, in the engine's thread.

        Raises:
            BusyError: the queue is full, or the engine is closing or has failed.
            UsageError: a prompt that the scheduler does not take.
        """
        ticket = Ticket(request, listener)
        with self._changed:
            self._check_healthy()
            self._scheduler.submit(ticket)
            self._changed.notify()
        return ticket

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Take no more requests, let those that are there go on for a while, then end them."""
        if not drain_s >= 0:
            raise UsageError("out of range", where="drain_s", expected="at least 0", found=drain_s)
        with self._changed:
            self._closing_at = time.monotonic() + drain_s
            self._changed.notify()
        self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _check_healthy(self) -> None:
        if not self.healthy:
            raise BusyError("the engine takes no requests", found=self.failure or "shutdown")

    def _run(self) -> None:
        try:
            while self._wait():
                with self._changed:
                    self._scheduler.admit()
                self._scheduler.step()
        except Exception as error:  # noqa: BLE001 - every request is told before the thread ends
            said = error if isinstance(error, QmixError) else QmixError(str(error)[:400])
            with self._changed:
                self.failure = said
                self._scheduler.end_all("error", said)
            self._scheduler.close()
            return
        with self._changed:
            self._scheduler.end_all("shutdown")
            until = self._closing_at
        self._scheduler.close(until or 0.0)

    def _wait(self) -> bool:
        """Wait for something to do; False once the engine is to end."""
        with self._changed:
            while self._scheduler.idle and self._closing_at is None:
                self._changed.wait()
            if self._closing_at is None:
                return True
            return not self._scheduler.idle and time.monotonic() < self._closing_at
