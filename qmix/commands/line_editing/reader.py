"""Messages read one at a time from a person or a pipe, and when one goes on in the next line.

Knows no line editor: it reads what a terminal or a pipe gives it line by line.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TextIO

from qmix.commands.line_editing.held_input import held_input

FENCE = '"""'
CONTINUED = "... "


class Work(Protocol):
    """What goes on in another thread."""

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it has ended, at most so long; whether it has."""

    def text(self) -> str:
        """How far it is, in a line."""


class LineReader(Protocol):
    """What the chat reads its messages from."""

    def read(self, prompt: str, default: str = "") -> str:
        """The next message, which may have several lines, without the newline that ended it.

        Args:
            default: text to begin with; only a line editor can show it.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C.
        """

    def read_during(self, prompt: str, work: Work) -> str | None:
        """The next message, if it ends before the work does.

        Returns:
            None once the work has ended: the next `read` begins with what was typed.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C.
        """

    def held(self) -> AbstractContextManager[None]:
        """While it is open, what is typed is not shown and waits for the next `read`."""


def is_open_fence(text: str) -> bool:
    """Whether a message begins with a fence and no line closes it."""
    lines = text.removeprefix(FENCE).split("\n")
    return text.startswith(FENCE) and not any(line.rstrip().endswith(FENCE) for line in lines)


def ends_in_backslash(text: str) -> bool:
    """Whether a message asks for another line: two backslashes are a backslash."""
    return (len(text) - len(text.rstrip("\\"))) % 2 == 1


def unfenced(text: str) -> str:
    """A message without its fence, if all of it stands in one."""
    whole = text.rstrip()
    if len(whole) < 2 * len(FENCE) or not (whole.startswith(FENCE) and whole.endswith(FENCE)):
        return text
    return whole[len(FENCE) : -len(FENCE)].strip("\n")


@dataclass(frozen=True)
class PlainLines:
    """Lines of a pipe, or of a terminal that cannot be drawn on.

    Args:
        notify: shows a line to the user.
        show: shows a prompt where somebody types. There a fence and a trailing backslash ask for
            another line; in a pipe they are text.
    """

    lines: TextIO
    notify: Callable[[str], None]
    show: Callable[[str], None] | None = None

    def read(self, prompt: str, default: str = "") -> str:
        text = self._line(prompt)
        while self.show and ((fenced := is_open_fence(text)) or ends_in_backslash(text)):
            try:
                text = (text if fenced else text[:-1]) + "\n" + self._line(CONTINUED)
            except EOFError:
                if not fenced:
                    return text
                self.notify(f"the message was not closed with {FENCE}; it was sent as it is")
                return f"{text}\n{FENCE}"
        return text

    def read_during(self, prompt: str, work: Work) -> str | None:
        with self.held():
            work.wait()
        return None

    def held(self) -> AbstractContextManager[None]:
        return held_input(self.lines, raw=False) if self.show else nullcontext()

    def _line(self, prompt: str) -> str:
        if self.show is not None:
            self.show(prompt)
        line = self.lines.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")
