"""A model that a thread loads while its user types. Knows no model and no terminal."""

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Event, Thread
from typing import Generic, TypeVar

from qmix.commands.load_bar import Progress, load_text
from qmix.commands.progress import Outlook

Loaded = TypeVar("Loaded")


class _Cancelled(BaseException):
    """Ends a load from within its progress, between two tensors."""


class BackgroundLoad(Generic[Loaded]):
    """A load that has begun.

    Args:
        load: loads the model and tells its argument how far it is.
        quiet: nothing is to be shown of it.

    Attributes:
        begun: when the first bytes were there, by time.monotonic; None before that.
    """

    def __init__(self, load: Callable[[Progress], Loaded], *, quiet: bool = False) -> None:
        self._load, self._quiet = load, quiet
        self._result = Future[Loaded]()
        self._cancelled = Event()
        self._bytes: tuple[int, int] = 0, 0  # read, and all
        self.begun: float | None = None
        self._thread = Thread(target=self._run, name="qmix-load", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, well or not, at most so long; whether it has."""
        wait([self._result], seconds)
        return self._result.done()

    def result(self) -> Loaded:
        """What was loaded.

        Raises:
            Exception: what the load raised.
        """
        return self._result.result()

    def status(self) -> tuple[str, int, int]:
        """What is loaded and how fast, the bytes that have been read, and all; 0 before that."""
        done, total = self._bytes
        if self.begun is None:
            return "loading", 0, 0
        return load_text(done, total, time.monotonic() - self.begun), done, total

    def text(self) -> str:
        """The same in a line with the time that is left; empty if it is to be quiet."""
        if self._quiet:
            return ""
        what, done, total = self.status()
        outlook = Outlook(begun=self.begun)
        outlook.update(done, total)
        parts = (what, f"{100 * outlook.share:.0f} %" if total else "", outlook.text())
        return " · ".join(filter(None, parts))

    def cancel(self) -> None:
        """End it at the next tensor, and wait for that: nothing runs on while Python exits."""
        self._cancelled.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._result.set_result(self._load(self._read))
        except BaseException as error:  # noqa: BLE001  raised where the result is asked for
            self._result.set_exception(error)

    def _read(self, done: int, total: int) -> None:
        if self._cancelled.is_set():
            raise _Cancelled
        self._bytes = done, total
        if self.begun is None:
            self.begun = time.monotonic()
