"""The bar of a model that is being loaded, with its speed. Knows no model."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from qmix.commands import terminal
from qmix.commands.progress import Show
from qmix.quantities import a_second, gigabytes

Progress = Callable[[int, int], None]  # bytes that have been read, and all


@contextmanager
def load_bar(*, quiet: bool = False) -> Iterator[Progress | None]:
    """Yield read(bytes that are there, all bytes); the bar appears with the first.

    What is said before, such as that kernels are compiled, stays above it.
    """
    if quiet:
        yield None
        return
    with ExitStack() as stack:
        show: Show | None = None
        begun = time.monotonic()

        def read(done: int, total: int) -> None:
            nonlocal show, begun
            if show is None:
                show = stack.enter_context(terminal.progress())
                begun = time.monotonic()
            show(load_text(done, total, time.monotonic() - begun), done, total)

        yield read


def load_text(done: int, total: int, seconds: float) -> str:
    """What is loaded, and how fast."""
    return f"loading {gigabytes(total)}, {a_second(done, seconds)}"
