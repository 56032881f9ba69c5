"""Turns: the threads that share a store take their steps through it one after another.

Knows no store and no step: only whose turn it is, and in which process.
"""

import os
from collections.abc import Callable
from threading import Lock, RLock, get_ident
from typing import TypeVar

from qmix.errors import UnsupportedError

Result = TypeVar("Result")


class Turns:
    """One step at a time, in the order in which threads ask, so that their streams interleave.

    A thread that waits holds `_next`, so the one whose turn ends cannot overtake it. `_turn` knows
    its owner: whatever interrupts a step, or the wait for it, the turn is given back.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._next, self._turn = Lock(), RLock()
        self._owner: int | None = None
        self._ended = True

    def take(self, begin: Callable[[bool], None], step: Callable[[], Result]) -> Result:
        """Wait for this thread's turn, and run a step in it.

        A step within a step, as a hook may start one, runs in the same turn.

        Args:
            begin: called first, with whether the step before ended; if not, an exception left it
                half done.

        Raises:
            UnsupportedError: this process was forked from the one that made the turns.
        """
        if os.getpid() != self._process:  # before a lock that another thread held at the fork
            raise UnsupportedError(
                "an offloaded model does not work in a forked process: the threads that read its "
                "experts stay in the parent",
                remedy="Load the model in the child, or start the child with spawn.",
            )
        if self._owner == get_ident():
            return step()
        try:
            with self._next:
                self._turn.acquire()
            self._owner = get_ident()
            begin(self._ended)
            self._ended = False
            result = step()
            self._ended = True
            return result
        finally:
            if self._owner == get_ident():
                self._owner = None
            try:  # noqa: SIM105  an interruption must find no Python code before the release
                self._turn.release()
            except RuntimeError:  # interrupted before it had the turn
                pass
