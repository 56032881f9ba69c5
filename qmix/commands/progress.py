"""How far a command is, on stderr: a bar on a terminal, a line a minute in a log, else nothing.

A time is told once a twentieth of the work is done: what was measured before that says little. Rich
is imported when a bar is drawn. Knows no command.
"""

import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from qmix.printable import escaped
from qmix.quantities import duration

if TYPE_CHECKING:
    from rich.console import Console

Show = Callable[[str, float, float], None]

TOLD_FROM = 0.05  # of the work
_LINE_EVERY_S = 60


class Outlook:
    """When work will end, if the rest goes as what is done. The unit of work is the caller's."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, begun: float | None = None
    ) -> None:
        self._clock, self._begun = clock, clock() if begun is None else begun
        self._end: float | None = None
        self.share = 0.0

    def update(self, done: float, total: float) -> None:
        """So much of the work is done now."""
        now = self._clock()
        self.share = min(1.0, done / total) if total > 0 else 0.0
        self._end = None
        if self.share >= TOLD_FROM:
            self._end = now + (now - self._begun) * (1 - self.share) / self.share

    def left(self) -> float | None:
        """Seconds until the end, counted down since the last update; None: too early to tell."""
        return None if self._end is None else max(0.0, self._end - self._clock())

    def text(self) -> str:
        """The same in words."""
        left = self.left()
        return "" if left is None else f"{duration(left)} left"


@contextmanager
def bar(screen: "Console", begun: float | None = None) -> Iterator[Show]:
    """A bar that goes when the work is done, which has begun now or earlier."""
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    outlook = Outlook(begun=begun)

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{duration(task.elapsed or 0)}  {outlook.text()}")

    drawn = Progress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        BarColumn(24),
        TextColumn("{task.percentage:>3.0f} %", table_column=Column(no_wrap=True)),
        Left(Column(no_wrap=True)),
        console=screen,
        transient=True,
        expand=True,
    )
    with drawn:
        task = drawn.add_task("", total=None)

        def show(what: str, done: float, total: float) -> None:
            outlook.update(done, total)
            drawn.update(task, description=escaped(what), completed=done, total=total or None)

        yield show


def log_lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Show:
    """A line a minute, each passed to `say`."""
    outlook, last = Outlook(clock), clock()

    def show(what: str, done: float, total: float) -> None:
        nonlocal last
        outlook.update(done, total)
        if clock() - last < _LINE_EVERY_S:
            return
        last = clock()
        say("  ".join(filter(None, (f"{100 * outlook.share:3.0f} %", outlook.text(), what))))

    return show


def stderr_is_log() -> bool:
    """Whether stderr goes to a file, which somebody reads later."""
    with suppress(OSError, ValueError):
        return stat.S_ISREG(os.fstat(sys.stderr.fileno()).st_mode)
    return False
