"""Load: many callers at a time, each with a number of questions, and what came of them.

Knows nothing of how the server was started.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qmix.evals.serving.http_call import Address, HttpCall
from qmix.evals.serving.questions import COMPLETIONS, Question, Reply, drawn

_SLOW_BYTES, _SLOW_S = 2048, 0.02
_PATIENCE_S = 600.0  # for one answer; beyond it the server counts as hanging
_TRIES = 1000


@dataclass
class Outcome:
    """What came of the questions, and the times that callers saw.

    Attributes:
        asked: by kind; a question counts once, however often it was refused.
        refused: answers that said to come again.
        wrong: one line for each answer that was not the right one.
        first_s: from sending a request that was taken to the first token of its stream.
        between_s: from one token of a stream to the next, where the caller read at once.
    """

    asked: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)


async def put_load(
    address: Address, replies: Sequence[Reply], *, clients: int, requests: int, seed: int
) -> Outcome:
    """Ask: every client its requests, one after the other, all clients at the same time."""
    outcome = Outcome()

    async def client(number: int) -> None:
        draw = random.Random(f"{seed}.{number}")
        for _ in range(requests):
            await _asked(address, drawn(replies, draw), outcome, draw)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return outcome


async def _asked(
    address: Address, question: Question, outcome: Outcome, draw: random.Random
) -> None:
    outcome.asked[question.kind] += 1
    receive_bytes = _SLOW_BYTES if question.kind == "slow" else None
    for _ in range(_TRIES):
        call = HttpCall(address, COMPLETIONS, question.body, receive_bytes=receive_bytes)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                found = await _answered(call, question, outcome)
        except (OSError, EOFError, ValueError, KeyError) as error:
            found = f"{type(error).__name__}: {error}"
        if call.status != 429:
            if found:
                outcome.wrong.append(f"{question.kind}: {found}")
            return
        outcome.refused += 1
        await asyncio.sleep(call.retry_s * (0.5 + draw.random()))
    outcome.wrong.append(f"{question.kind}: refused {_TRIES} times")


async def _answered(call: HttpCall, question: Question, outcome: Outcome) -> str:
    """What is wrong with the answer; nothing if it is right, or says to come again."""
    if question.kind == "cancels" and not question.streams:
        try:
            async with asyncio.timeout(0.01 * question.events), call:
                await call.document()
        except TimeoutError:
            return ""
        return ""
    begun = time.perf_counter()
    async with call:
        if call.status == 429:
            return ""
        if call.status != question.status:
            return f"status {call.status}: {await call.document()}"
        if question.streams:
            return await _streamed(call, question, outcome, begun)
        document = await call.document()
        if question.text is None:
            return "" if document["error"]["message"] else "no message"
        return _difference(document["choices"][0]["text"], question.text)


async def _streamed(call: HttpCall, question: Question, outcome: Outcome, begun: float) -> str:
    text, last = "", None
    events = 0
    async for document in call.events():
        if "error" in document:
            return str(document["error"])
        now = time.perf_counter()
        if question.kind != "slow" and document["choices"][0]["finish_reason"] is None:
            if last is None:
                outcome.first_s.append(now - begun)
            else:
                outcome.between_s.append(now - last)
            last = now
        text += document["choices"][0]["text"]
        events += 1
        if question.kind == "cancels" and events > question.events:
            return _difference(text, (question.text or "")[: len(text)])
        if question.kind == "slow":
            await asyncio.sleep(_SLOW_S)
    return _difference(text, question.text or "")


def _difference(found: str, right: str) -> str:
    return "" if found == right else f"expected {right!r}; found {found!r}"
