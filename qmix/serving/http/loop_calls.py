"""LoopCalls: calls of the engine's thread that the event loop makes. Knows no events."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec

Arguments = ParamSpec("Arguments")


class LoopCalls:
    """`call_soon_threadsafe` for a thread that must not wait: one wake-up for all that has come.

    To wake a loop is a system call, for which Python lets go of its lock. The loop takes it, and
    the caller has it again only when the loop has written everything: 0.2 ms a token. So a third
    thread wakes the loop, while the caller computes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._waker = ThreadPoolExecutor(1, "qmix-waker")

    def put(
        self,
        function: Callable[Arguments, object],
        *arguments: Arguments.args,
        **keywords: Arguments.kwargs,
    ) -> None:
        """Let the loop make a call, after those that were put before."""
        self._calls.append(partial(function, *arguments, **keywords))
        if len(self._calls) == 1:  # else the loop comes for the first one, and takes this one too
            self._waker.submit(self._loop.call_soon_threadsafe, self._make)

    def _make(self) -> None:
        while self._calls:
            self._calls.popleft()()
