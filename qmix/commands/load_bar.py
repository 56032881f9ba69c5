"""The bar of a model that is being loaded, with its speed. Knows no model."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from qmix.commands import terminal
from qmix.commands.progress import Show
from qmix.quantities import a_second, gigabytes


@contextmanager
def load_bar(*, quiet: bool = False) -> Iterator[Callable[[int, int], None] | None]:
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
            speed = a_second(done, time.monotonic() - begun)
            show(f"loading {gigabytes(total)}, {speed}", done, total)

        yield read
