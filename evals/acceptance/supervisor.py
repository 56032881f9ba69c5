"""Runs the steps in one worker, watches their time, and starts another worker after a kill.

A step that raises, hangs or ends its process costs itself, and the time of a start. Knows nothing
of torch, and of a step only its name and its seconds.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qmix.evals.acceptance.journal import Journal
from qmix.evals.acceptance.record import Status
from qmix.evals.acceptance.step import Step

START_SECONDS = 60.0  # to import torch and start CUDA, on a busy machine
_LEAST_SECONDS = 3.0  # with less left, no step begins
_MOST_FAILED_STARTS = 2  # then no other worker is tried

Message = dict[str, Any]


class WorkerGoneError(Exception):
    """The worker's process has ended; the argument says how, with what it printed last."""


class Worker(Protocol):
    """A process that runs one step after another."""

    def request(self, step: str) -> None:
        """Begin a step."""

    def receive(self, seconds: float) -> Message | None:
        """The worker's next message; None if there is none within `seconds`.

        Raises:
            WorkerGoneError: there will be none.
        """

    def end(self) -> str:
        """End the process and whatever it started; what it printed last."""


@dataclass(frozen=True)
class _Ended:
    status: Status
    error: str | None = None
    worker_is_lost: bool = False


class Supervisor:
    """Runs steps within a budget of seconds, which begins now.

    Args:
        start: starts a worker. Its first message is {"machine": ...}, then it waits for requests.
        on_end: called after each step with its name.
    """

    def __init__(
        self,
        start: Callable[[], Worker],
        journal: Journal,
        budget: float,
        *,
        on_begin: Callable[[Step, float], None] = lambda step, limit: None,
        on_end: Callable[[Step], None] = lambda step: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start, self._journal, self._clock = start, journal, clock
        self._deadline = clock() + budget
        self._on_begin, self._on_end = on_begin, on_end
        self._worker: Worker | None = None
        self._failed_starts = 0  # in a row

    def run(self, steps: Sequence[Step]) -> list[Step]:
        """Run the steps in their order.

        Returns:
            those that the time did not suffice for, or for which no worker could be started.
        """
        left_out = []
        try:
            for step in steps:
                left = self._deadline - self._clock()
                if left < _LEAST_SECONDS or self._failed_starts == _MOST_FAILED_STARTS:
                    left_out.append(step)
                    continue
                self._run(step, left)
                self._on_end(step)
        finally:
            self._end_worker()
        return left_out

    def _run(self, step: Step, left: float) -> None:
        limit = min(left, step.seconds + (START_SECONDS if self._worker is None else 0.0))
        self._on_begin(step, limit)
        begun = self._clock()
        self._journal.add({"step": step.name})
        ended = self._watched(step, begun + limit, limit)
        if ended.worker_is_lost:
            self._end_worker()
        seconds = self._clock() - begun
        self._journal.add(
            {"step": step.name, "end": ended.status, "seconds": seconds, "error": ended.error}
        )

    def _watched(self, step: Step, deadline: float, limit: float) -> _Ended:
        """Have the worker run a step, and write its results down until it ends."""
        try:
            if self._worker is None:
                self._worker = self._start()
                self._failed_starts += 1  # unless it says a word
                asked = False
            else:
                self._worker.request(step.name)
                asked = True
            while True:
                message = self._worker.receive(max(0.0, deadline - self._clock()))
                if message is None:
                    said = self._end_worker()
                    return _Ended("timeout", f"{said}\nended after {limit:.0f} s".strip(), True)
                if "machine" in message:
                    self._failed_starts = 0
                    self._journal.add(message)
                    if not asked:
                        self._worker.request(step.name)
                        asked = True
                elif "result" in message:
                    self._journal.add({"step": step.name, "result": message["result"]})
                else:
                    return _Ended(message["end"], message["error"], message["fatal"])
        except WorkerGoneError as gone:
            return _Ended("failed", str(gone), True)

    def _end_worker(self) -> str:
        worker, self._worker = self._worker, None
        return "" if worker is None else worker.end()
