"""What the commands show: progress and notices on stderr, results on stdout. Knows no command.

Everything that a command prints goes through here and is escaped, whatever it came from. Rich is
imported when something is drawn, never before.
"""

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from io import TextIOWrapper
from typing import IO, TYPE_CHECKING, Any, TextIO

from qmix.errors import QmixError, ResourceError
from qmix.files.file_errors import FULL
from qmix.printable import escaped, escaped_lines, printable

if TYPE_CHECKING:
    from rich.console import Console

    from qmix.commands.progress import Show

_BETWEEN = " · "
_DEBUG = "QMIX_DEBUG"  # set by --debug
_BROKEN_PIPE = 141  # as shells call the end by SIGPIPE


def is_dumb() -> bool:
    """Whether TERM names a terminal without escape sequences, or none."""
    return os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")


def console() -> "Console":
    """stderr, drawn by rich."""
    from rich.console import Console

    return Console(stderr=True)


def notice(text: str) -> None:
    """A dim line on stderr, escaped; it is never parsed as markup."""
    show_lines(escaped(text), console(), style="dim")


class _Notices(logging.Handler):
    """What qmix's own modules report while they work."""

    def emit(self, record: logging.LogRecord) -> None:
        notice(record.getMessage())


def show_logged() -> None:
    """Show what qmix logs as notices, from now on."""
    logger = logging.getLogger("qmix")
    logger.setLevel(logging.INFO)
    logger.handlers = [_Notices()]
    logging.getLogger("qmix.requests").setLevel(logging.CRITICAL)  # see --log-json


def notice_changes(path: object, changes: Sequence[str], remedy: str | None = None) -> None:
    """Say what was changed of a file's text before it is used, if anything was."""
    if changes:
        notice(f"{path}: {', '.join(changes)}{f' ({remedy})' if remedy else ''}")


def message(text: str) -> None:
    """A line on stderr, escaped; it is never parsed as markup."""
    show_lines(escaped(text), console())


def columns(stream: IO[str]) -> int:
    """The width of a terminal at this moment, also of a dumb one; 80 if it has none to say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _width(screen: "Console") -> int:
    return columns(screen.file) if screen.is_dumb_terminal else screen.width


def show_lines(text: str, screen: "Console", style: str = "", end: str = "\n") -> None:
    """Lines for a person, each escaped; a terminal gets them wrapped between words.

    A line of parts that " · " separates is broken between two of them, where it can be.

    A screen that cannot be written to is no error.
    """
    whole, shown = not screen.is_terminal, escaped_lines(text)
    if not whole and _BETWEEN in shown:
        width = _width(screen)
        shown = "\n".join("\n".join(_parted(line, width)) for line in shown.split("\n"))
    with suppress(OSError):
        screen.print(
            shown,
            style=style,
            end=end,
            markup=False,
            highlight=False,
            soft_wrap=whole,
        )


def _parted(line: str, width: int) -> list[str]:
    """A line in lines of as many of its parts as fit on each."""
    from rich.cells import cell_len

    first, *others = line.split(_BETWEEN)
    lines = [first]
    for part in others:
        longer = f"{lines[-1]}{_BETWEEN}{part}"
        if cell_len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


def cells(texts: Sequence[str], width: int | None = None, *, right: bool = False) -> list[str]:
    """Escaped texts of one width on a terminal, where some characters take two columns or none.

    Args:
        width: columns; what is wider is cut. None: those of the widest.
        right: texts end together, and do not begin together.
    """
    from rich.cells import cell_len, set_cell_size

    shown = [escaped(text) for text in texts]
    most = max(map(cell_len, shown), default=0) if width is None else width
    cut = [text if cell_len(text) <= most else set_cell_size(text, most) for text in shown]
    gaps = [" " * (most - cell_len(text)) for text in cut]
    return [gap + text if right else text + gap for text, gap in zip(cut, gaps, strict=True)]


def show_status(text: str, screen: "Console") -> None:
    """A dim line of parts that " · " separates; on a terminal, of as many as fit on one line."""
    if screen.is_terminal:
        text = _fitting(text, _width(screen))
    show_lines(text, screen, style="dim")


def _fitting(text: str, width: int) -> str:
    """The first parts of a line, as many as fit; the first one is cut if it alone is too wide."""
    from rich.cells import cell_len, set_cell_size

    parts = escaped(text).split(_BETWEEN)
    while len(parts) > 1 and cell_len(_BETWEEN.join(parts)) > width:
        parts.pop()
    line = _BETWEEN.join(parts)
    return line if cell_len(line) <= width else set_cell_size(line, max(0, width - 1)) + "…"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr, its cells escaped."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*header)
    for row in rows:
        drawn.add_row(*(Text(escaped(cell)) for cell in row))
    with suppress(OSError):
        console().print(drawn)


def print_error(error: BaseException, *, with_traceback: bool = False) -> None:
    """An error on stderr: in one line, or escaped line by line after its traceback."""
    if with_traceback:
        text = escaped_lines("".join(traceback.format_exception(error)))
    elif isinstance(error, QmixError):
        text = f"qmix: {error}\n"
    else:
        first = next(iter(str(error).splitlines()), "")
        name = type(error).__name__
        text = f"qmix: {name}: {escaped(first) or name} (--debug shows where)\n"
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def print_error_as_json(error: BaseException, exit_code: int) -> None:
    """An error as one JSON object on stdout, of the fields of `QmixError.to_dict`."""
    if isinstance(error, QmixError):
        document = error.to_dict()
    else:
        said = getattr(error, "format_message", error.__str__)()
        context = getattr(error, "ctx", None)
        remedy = None if context is None else f"{context.command_path} --help"
        what = next(iter(said.splitlines()), "") or type(error).__name__
        document = QmixError(what, where=getattr(error, "filename", None), remedy=remedy).to_dict()
    print_json({**document, "exit_code": exit_code})


def print_usage_error(error: Any) -> int:
    """What typer says about a wrong command line, on stderr, escaped; returns the exit code."""
    from io import StringIO

    said = StringIO()
    error.show(file=said)
    with suppress(OSError):
        # What typer 0.29 puts before the names that a wrong one is not among.
        sys.stderr.write(escaped_lines(said.getvalue().replace("Value error, ", "")))
        sys.stderr.flush()
    return int(error.exit_code)


def format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None
) -> str:
    """A warning in one line, escaped; takes the place of `warnings.formatwarning`.

    Where it was raised helps nobody who has not asked for tracebacks.
    """
    where = f"{filename}:{lineno}: {category.__name__}" if _DEBUG in os.environ else "warning"
    return escaped(f"{where}: {message}") + "\n"


def write(text: str, stream: TextIO | None = None) -> None:
    """Model text to stdout, or to `stream`, at once, without what controls a terminal.

    Raises:
        ResourceError: the stream cannot be written; what it still holds is dropped.
    """
    _put(printable(text), sys.stdout if stream is None else stream)


def write_drawn(text: str, stream: TextIO) -> None:
    """Text that has been drawn, its escape sequences included; its words were made `printable`.

    Raises:
        ResourceError: the stream cannot be written; what it still holds is dropped.
    """
    _put(text, stream)


def flush() -> None:
    """Write out what stdout still holds.

    Raises:
        ResourceError: it cannot be written, and is dropped.
    """
    _put(None, sys.stdout)  # a full device refuses an empty text, too, where none is held


def _put(text: str | None, stream: TextIO) -> None:
    try:
        if text is not None:
            stream.write(text)
        stream.flush()
    except OSError as error:
        # The interpreter would try the same bytes again at its end, and fail again.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if isinstance(error, BrokenPipeError):
            # The reader has gone. SIGPIPE itself would end a download whose server has gone, too.
            raise SystemExit(_BROKEN_PIPE) from None
        full = error.errno in FULL
        raise ResourceError(
            "cannot be written",
            where="stdout",
            found=error.strerror,
            remedy=f"Send it to {'a disk with room' if full else 'another file'}, or to a pipe.",
        ) from None


def print_json(document: Mapping[str, Any]) -> None:
    """A document in one line of ASCII on stdout."""
    import json

    _put(json.dumps(document).replace("\x7f", "\\u007f") + "\n", sys.stdout)


def print_result(
    text: str, document: Mapping[str, Any], *, as_json: bool, failure: QmixError | None = None
) -> None:
    """A command's result on stdout: for a person, or as JSON.

    Args:
        failure: what the result shows to be wrong; JSON then holds both.

    Raises:
        QmixError: the failure.
        SystemExit: with its exit code; the JSON has said why.
    """
    if not as_json:
        _put(escaped_lines(text), sys.stdout)
        if failure is not None:
            raise failure
    elif failure is None:
        print_json(document)
    else:
        print_json({**document, **failure.to_dict()})
        raise SystemExit(failure.exit_code)


def asked(question: str) -> bool:
    """Whether the user answers yes; no answer is no. The question goes to stderr."""
    with suppress(OSError):
        sys.stderr.write(f"{escaped(question)} [y/N] ")
        sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def decode_utf8(stream: object) -> None:
    """Read UTF-8 whatever the locale: broken bytes become U+FFFD, a byte-order mark is dropped."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8-sig", errors="replace")


class HeldText(io.StringIO):
    """Text for a terminal, which is styled as there."""

    def isatty(self) -> bool:
        return True


@contextmanager
def held_stderr() -> Iterator[HeldText]:
    """Keep what is written to stderr while this is open, if that is a terminal; then write it."""
    held = HeldText()
    if not sys.stderr.isatty():
        yield held
        return
    try:
        with redirect_stderr(held):
            yield held
    finally:
        with suppress(OSError):
            sys.stderr.write(held.getvalue())
            sys.stderr.flush()


@contextmanager
def progress(begun: float | None = None) -> Iterator["Show"]:
    """Yield show(what, done, total): a bar on a terminal, a line a minute in a log, else nothing.

    A terminal that cannot move its cursor gets the lines of a log.

    Args:
        begun: when the work of a bar began, by time.monotonic; default: now.
    """
    from qmix.commands.progress import bar, log_lines, stderr_is_log

    screen = console()
    if screen.is_terminal and not screen.is_dumb_terminal:
        with bar(screen, begun) as show:
            yield show
    elif screen.is_terminal or stderr_is_log():
        yield log_lines(message)
    else:
        yield lambda what, done, total: None


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
