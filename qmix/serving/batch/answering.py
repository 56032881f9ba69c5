"""Lines answered by an engine's slots, many at a time, and given back in order.

Knows no file.
"""

import queue
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qmix.errors import QmixError
from qmix.serving.batch.prompt_lines import Asking, PromptLine, own_id
from qmix.serving.engine import Engine
from qmix.serving.request import Ended, Event

# Lines on their way for each slot: a slow one must not keep the other slots waiting.
_AHEAD = 8


@dataclass
class _Flight:
    """A line on its way: its text so far, and its result once it has ended."""

    line: PromptLine
    text: str = ""
    result: dict[str, Any] | None = None


def ahead(slots: int) -> int:
    """Lines on their way at most: what the engine's queue must take."""
    return _AHEAD * slots


def answers(
    engine: Engine, asking: Asking, lines: Iterable[PromptLine], settings: str
) -> Iterator[dict[str, Any]]:
    """The result of each line, in order.

    A line that asks for nothing sensible has a result that says so.

    Args:
        engine: its queue takes eight requests a slot.
        settings: see `PromptLine.key`.

    Raises:
        QmixError: the engine failed; the lines that were on their way have no result.
    """
    events: queue.SimpleQueue[tuple[_Flight, Event]] = queue.SimpleQueue()
    flights: list[_Flight] = []
    left = iter(lines)
    most = ahead(engine.limits.slots)
    while True:
        while len(flights) < most and (line := next(left, None)) is not None:
            flight = _Flight(line)
            flights.append(flight)
            _submit(engine, asking, flight, events)
        if not flights:
            return
        while flights[0].result is None:
            flight, event = events.get()
            if not isinstance(event, Ended):
                flight.text += event.text
                continue
            if event.finish not in ("stop", "length", "error") or engine.failure is not None:
                raise engine.failure or QmixError("the engine was closed", found=event.finish)
            flight.result = _outcome(flight.text, event)
        done = flights.pop(0)
        assert done.result is not None
        yield _named(done.line, settings) | done.result


def _submit(
    engine: Engine,
    asking: Asking,
    flight: _Flight,
    events: "queue.SimpleQueue[tuple[_Flight, Event]]",
) -> None:
    try:
        request = asking.request(flight.line)
        engine.submit(request, lambda event: events.put((flight, event)))
    except QmixError as error:
        if not engine.healthy:
            raise
        flight.result = {"error": str(error)}


def _outcome(text: str, ended: Ended) -> dict[str, Any]:
    if ended.error is not None:
        return {"error": str(ended.error)}
    return {
        "text": text,
        "finish": ended.finish,
        "prompt_tokens": ended.prompt_tokens,
        "new_tokens": ended.new_tokens,
    }


def _named(line: PromptLine, settings: str) -> dict[str, Any]:
    named: dict[str, Any] = {"line": line.number, "key": line.key(settings)}
    identity = own_id(line)
    return named if identity is None else named | {"id": identity}
