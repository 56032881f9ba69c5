"""What the commands show: progress and notices on stderr, results on stdout. Knows no command.

Rich is imported when something is drawn, never before.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from typer import Context

_LINE_EVERY_S = 10


def console() -> "Console":
    """stderr, drawn by rich."""
    from rich.console import Console

    return Console(stderr=True)


def notice(text: str) -> None:
    """A dim line on stderr; the text is never parsed as markup."""
    console().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def message(text: str) -> None:
    """A line on stderr; the text is never parsed as markup."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(document: Mapping[str, Any]) -> None:
    """A document in one line on stdout."""
    import json

    sys.stdout.write(json.dumps(document) + "\n")


def print_result(text: str, document: Mapping[str, Any], *, as_json: bool) -> None:
    """A command's result on stdout: for a person, or as JSON."""
    if as_json:
        print_json(document)
    else:
        sys.stdout.write(text)


def print_help(context: "Context") -> None:
    """The help of a command on stdout."""
    sys.stdout.write(context.get_help() + "\n")


def decode_utf8(stream: object) -> None:
    """Read UTF-8 whatever the locale: broken bytes become U+FFFD, a byte-order mark is dropped."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8-sig", errors="replace")


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield show(what, done, total): a bar on a terminal, a line every ten seconds elsewhere."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = console()
    if not screen.is_terminal:
        yield _lines()
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def _lines() -> Callable[[str, int, int], None]:
    begun = last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _LINE_EVERY_S or not done:
            return
        last = now
        left = (now - begun) * (total - done) / done
        sys.stderr.write(f"{100 * done // total:3d} %  eta {left:.0f} s  {what}\n")
        sys.stderr.flush()

    return show


def enable_ctrl_c() -> None:
    """Answer Ctrl-C even if SIGINT was inherited as ignored or blocked, as from a script's `&`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield asked(): whether Ctrl-C or SIGTERM came; the second Ctrl-C ends the program at once."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked = True
        sys.stderr.write("\nstopping after this layer; Ctrl-C again stops at once\n")

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
