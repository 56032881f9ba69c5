"""Work that may go on beside the next layer: one piece at a time, each to its end.

Knows nothing of what the work is.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """Runs pieces of work in order in a thread of its own.

    Leaving its `with` block waits for the piece at work.

    Args:
        beside: False runs each piece at once instead, in the caller's thread.
    """

    def __init__(self, beside: bool) -> None:
        self._thread = ThreadPoolExecutor(1) if beside else None
        self._work: Future[None] | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Begin a piece of work once the one before it has ended, whose error is raised."""
        self.wait()
        if self._thread is None:
            work()
        else:
            self._work = self._thread.submit(work)

    def wait(self) -> None:
        """Wait for the piece at work, and raise its error."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown()
