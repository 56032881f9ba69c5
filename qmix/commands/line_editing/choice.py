"""Which reader suits the streams: the line editor on a terminal, plain lines elsewhere."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, TextIO

from rich.console import Console

from qmix.commands import terminal
from qmix.commands.line_editing.command import Command
from qmix.commands.line_editing.reader import LineReader, PlainLines


def line_reader(
    lines: TextIO,
    text: TextIO,
    notices: Console,
    *,
    commands: Sequence[Command] = (),
    settings: Mapping[str, Sequence[str]] | None = None,
    models: Callable[[], Iterable[str]] = tuple,
) -> LineReader:
    """A line editor with history and completion, or the lines as they come.

    The editor draws on `text` or on `notices`, whichever is a terminal, or else on the terminal
    that the program was started from, so that replies may go to a pipe.

    Args:
        commands, settings, models: what is completed; see `ChatCompleter`.
    """

    def notify(line: str) -> None:
        terminal.show_lines(line, notices, style="dim")

    if not lines.isatty():
        return PlainLines(lines, notify)
    screen = None if terminal.is_dumb() else _screen(text, notices.file)
    if screen is None:
        return PlainLines(
            lines, notify, lambda prompt: terminal.show_lines(prompt, notices, end="")
        )
    # Only who talks to a terminal waits for prompt_toolkit.
    from qmix.commands.line_editing.completion import ChatCompleter
    from qmix.commands.line_editing.editor import LineEditor
    from qmix.commands.line_editing.history import history_file

    completer = ChatCompleter(commands, settings or {}, models)
    return LineEditor.on_terminal(
        lines, screen, history_file, completer, in_pipeline=not text.isatty()
    )


def _screen(*streams: IO[str]) -> IO[str] | None:
    for stream in streams:
        if stream.isatty():
            return stream
    try:
        return open(os.ctermid(), "w", encoding="utf-8")
    except OSError:
        return None
