"""Flight: the requests of one call on their way through the engine, and their events as they come.

Carries events from the engine's thread to the event loop. Knows no documents.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.types import Receive

from qmix.errors import QmixError
from qmix.serving.engine import Engine
from qmix.serving.http.call_record import CallRecord
from qmix.serving.http.errors import ApiError
from qmix.serving.http.loop_calls import LoopCalls
from qmix.serving.request import Ended, Event, Listener, Request, Ticket

Result = TypeVar("Result")
_BEAT_S = 10.0  # what waits sends a sign of life as often, and so finds out that a peer is gone


class LeftError(Exception):
    """The client has closed its connection."""


@contextmanager
def _refusals(engine: Engine) -> Iterator[None]:
    """What the engine refuses is told as ApiError."""
    try:
        yield
    except QmixError as error:
        raise ApiError.of(error, takes_requests=engine.healthy) from error


class Flights:
    """All that come from one event loop.

    Args:
        observe: called with the end of each request, if it comes before its flight is cancelled.
    """

    def __init__(self, engine: Engine, observe: Callable[[Ended], None]) -> None:
        self._engine, self._observe = engine, observe
        self._calls: LoopCalls | None = None

    def check_room(self) -> None:
        """Refuse requests before they are prepared.

        Raises:
            ApiError: the engine would not take one.
        """
        with _refusals(self._engine):
            self._engine.check_room()

    def begin(self, requests: Sequence[Request], record: CallRecord) -> "Flight":
        """Submit requests.

        Args:
            record: told of what becomes of them.

        Raises:
            ApiError: the engine does not take them; none is left behind.
        """
        if self._calls is None:
            self._calls = LoopCalls(asyncio.get_running_loop())
        return Flight(self._engine, requests, self._observe, self._calls, record)


class Flight:
    """Requests that have been submitted. Whoever began it cancels it at the end.

    Raises:
        ApiError: see Flights.begin.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        observe: Callable[[Ended], None],
        calls: LoopCalls,
        record: CallRecord,
    ) -> None:
        self._record = record
        self._observe, self._calls = observe, calls
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        try:
            with _refusals(engine):
                for index, request in enumerate(requests):
                    self._tickets.append(engine.submit(request, self._listener(index)))
        except ApiError:
            self._cancel()
            raise

    def __len__(self) -> int:
        return len(self._tickets)

    def cancel(self) -> None:
        """End the requests that have not ended."""
        self._cancel()
        self._record.close()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event] | None]:
        """Each event with its request's index, until all have ended; None: nothing for a while.

        Raises:
            ApiError: a request ended without a reply.
        """
        left = len(self)
        while left:
            try:
                # Not wait_for: up to Python 3.11 it loses a cancellation that comes with an event.
                async with asyncio.timeout(_BEAT_S):
                    index, event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            self._record.put(index, event)
            if isinstance(event, Ended):
                self._observe(event)
                _check(event)
                left -= 1
            yield index, event

    def _listener(self, index: int) -> Listener:
        def listener(event: Event) -> None:
            self._calls.put(self._events.put_nowait, (index, event))

        return listener


def _check(ended: Ended) -> None:
    """
    Raises:
        ApiError: it ended otherwise than by its own end.
    """
    if ended.finish == "error":
        raise ApiError.of(ended.error or QmixError("the request failed"))
    if ended.finish == "deadline":
        raise ApiError("the request took too long", status=504, code="deadline_exceeded")
    if ended.finish not in ("stop", "length"):
        raise ApiError("the server is shutting down", status=503, code="unavailable")


async def unless_left(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of work, which ends at once if the client closes its connection.

    Args:
        receive: of a request whose body has been read.

    Raises:
        LeftError: the client did.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise LeftError
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
