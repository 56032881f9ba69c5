"""The line editor of the chat: a message is one block of lines, edited until Enter.

Knows nothing of what a message means. The terminal is not asked where its cursor stands: over a
slow line the answer would arrive among what is typed.
"""

import asyncio
import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import IO, TextIO, cast

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import Completer
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import AnyFormattedText, StyleAndTextTuples
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.input.defaults import create_input
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.styles import Style

from qmix.commands import terminal
from qmix.commands.line_editing.external_editor import edited
from qmix.commands.line_editing.held_input import held_input
from qmix.commands.line_editing.interrupt_key import interrupt_key
from qmix.commands.line_editing.reader import CONTINUED, Work, ends_in_backslash, is_open_fence
from qmix.errors import UsageError
from qmix.printable import printable

_STYLE = Style.from_dict({"work": "ansibrightblack"})
_LOOK_EVERY_S = 0.05  # at the work that goes on while a message is typed


class _Interrupted(Exception):  # noqa: N818  no error: the prompt is drawn again
    """Something is to be said above the message that is being typed."""


class LineEditor:
    """Edits messages on a terminal.

    Enter ends a message, unless it came in the middle of a paste, behind a backslash or in a fence
    that is still open. So it does between messages: what is typed there becomes the next ones, in
    turn, and a paste stays one block as long as the terminal marks it.
    Alt-Enter adds a line, Ctrl-G opens the user's editor, Ctrl-R searches.

    Nothing is drawn and no file is touched before the first `read`.

    Args:
        keyboard: what is read.
        screen: what is drawn on.
        history: gives the messages of earlier chats, and takes new ones.
        held: the terminal that waits between messages, if it is one.
        editor_screen: where the user's editor draws, if not on stdout.
        in_pipeline: between messages Ctrl-C interrupts this program alone, not those that its
            replies go to.
    """

    def __init__(
        self,
        keyboard: Input,
        screen: Output,
        *,
        history: Callable[[], History | None] = InMemoryHistory,
        completer: Completer | None = None,
        held: TextIO | None = None,
        editor_screen: IO[str] | None = None,
        in_pipeline: bool = False,
    ) -> None:
        self._keyboard, self._screen = keyboard, screen
        self._history, self._completer = history, completer
        self._held, self._editor_screen = held, editor_screen
        self._in_pipeline = in_pipeline
        self._typed = Document()  # before the prompt was interrupted
        self._is_in_editor = False
        self._held_keys = 0  # of those that have not been read, how many came between messages

    @classmethod
    def on_terminal(
        cls,
        keyboard: TextIO,
        screen: IO[str],
        history: Callable[[], History | None],
        completer: Completer,
        *,
        in_pipeline: bool,
    ) -> "LineEditor":
        """An editor that reads one stream and draws on another; both are terminals."""

        def size() -> Size:
            """One line less than there are: tmux keeps what fills them all before it is erased."""
            columns, rows = os.get_terminal_size(screen.fileno())
            return Size(rows=max(2, rows - 1) if rows else 23, columns=columns or 80)

        term = os.environ.get("TERM")
        output = Vt100_Output(cast(TextIO, screen), size, term=term, enable_cpr=False)
        return cls(
            create_input(keyboard),
            output,
            history=history,
            completer=completer,
            held=keyboard,
            editor_screen=screen,
            in_pipeline=in_pipeline,
        )

    def read(self, prompt: str, default: str = "") -> str:
        """Edit a message; then all of its lines are shown once, also where they fill the screen."""
        return self._read(prompt, default or self._typed)

    def read_during(self, prompt: str, work: Work) -> str | None:
        """Edit a message while other work goes on, which a line above it tells of.

        What is said on stderr meanwhile appears there, too.

        Returns:
            the message; None if the work has ended first. Then the next `read` begins with what
            was typed.
        """

        def message() -> StyleAndTextTuples:
            told = work.text()
            return [("class:work", f"{told}\n" if told else ""), ("", prompt)]

        while not work.wait(0):
            try:
                with terminal.held_stderr() as said:
                    begin = partial(self._watch, work, said)
                    return self._read(prompt, self._typed, message, begin)
            except _Interrupted:
                self._typed = self._session.default_buffer.document
        return None

    def _read(
        self,
        prompt: str,
        default: str | Document,
        message: AnyFormattedText = None,
        begin: Callable[[], None] | None = None,
    ) -> str:
        """Edit a message behind a prompt, which may be drawn in another way meanwhile."""
        self._typed = Document()
        try:
            text = self._session.prompt(message or prompt, default=default, pre_run=begin)
        except KeyboardInterrupt:
            self._show(prompt, self._session.default_buffer.text)
            raise
        self._show(prompt, text)
        return text

    def _watch(self, work: Work, said: terminal.HeldText) -> None:
        """End the prompt once the work is done or says something, and nobody searches or so."""
        app = self._session.app

        async def watch() -> None:
            shown = ""
            while not (work.wait(0) or said.getvalue()) or self._is_elsewhere:
                if shown != (shown := work.text()):
                    app.invalidate()
                await asyncio.sleep(_LOOK_EVERY_S)
            if not app.is_done:
                app.exit(exception=_Interrupted)

        app.create_background_task(watch())

    @property
    def _is_elsewhere(self) -> bool:
        """Whether keys go to a search, or to an editor that covers the screen."""
        return self._is_in_editor or not self._session.app.layout.has_focus(DEFAULT_BUFFER)

    def _show(self, prompt: str, text: str) -> None:
        shown = text.replace("\n", f"\n{CONTINUED}")
        self._screen.write(printable(f"{prompt}{shown}\n"))
        self._screen.flush()

    @cached_property
    def _session(self) -> "PromptSession[str]":
        session: PromptSession[str] = PromptSession(
            multiline=True,
            prompt_continuation=CONTINUED,
            history=self._history(),
            completer=self._completer,
            complete_while_typing=False,
            enable_suspend=True,
            erase_when_done=True,
            key_bindings=self._keys(),
            style=_STYLE,
            input=self._keyboard,
            output=self._screen,
        )
        session.app.key_processor.after_key_press += self._count_key
        return session

    def _count_key(self, _: object) -> None:
        self._held_keys = max(0, self._held_keys - 1)

    def _take_held_keys(self) -> None:
        """Keep what waits for the next `read`, and how much it is."""
        keys = get_typeahead(self._keyboard)
        while more := self._keyboard.read_keys():
            keys += more
        store_typeahead(self._keyboard, keys)
        self._held_keys = len(keys)

    @contextmanager
    def held(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._held is not None:
                self._screen.enable_bracketed_paste()
                self._screen.flush()
                stack.callback(self._screen.flush)
                stack.callback(self._screen.disable_bracketed_paste)
            if self._held is not None:
                alone = not self._in_pipeline
                stack.enter_context(held_input(self._held, raw=True, interrupts=alone))
            if self._in_pipeline:
                stack.enter_context(interrupt_key(self._keyboard))
            stack.callback(self._take_held_keys)
            yield

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()
        in_message = has_focus(DEFAULT_BUFFER)  # not in the search

        @keys.add("enter", filter=in_message)
        def end_or_go_on(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            is_pasted = not self._held_keys and _more_is_coming(event)
            if is_pasted or is_open_fence(buffer.text):
                buffer.insert_text("\n")
            elif buffer.document.is_cursor_at_the_end and ends_in_backslash(buffer.text):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=in_message)
        def add_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-g", filter=in_message)
        async def open_editor(event: KeyPressEvent) -> None:
            text = event.current_buffer.text
            self._is_in_editor = True
            try:
                text = await run_in_terminal(lambda: self._edited(text), in_executor=True)
            finally:
                self._is_in_editor = False
            event.current_buffer.document = Document(text)

        return keys

    def _edited(self, text: str) -> str:
        try:
            return edited(text, self._editor_screen)
        except UsageError as error:
            terminal.message(f"qmix: {error}")
            return text


def _more_is_coming(event: KeyPressEvent) -> bool:
    """Whether keys wait behind this one, as in a paste that the terminal does not mark as one."""
    if event.key_processor.input_queue:
        return True
    return bool(select.select([event.app.input.fileno()], [], [], 0)[0])
