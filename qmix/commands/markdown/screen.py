"""The terminal that a reply is drawn on: its width, its colours, and what waits to be written."""

from typing import TextIO

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from qmix.commands import terminal
from qmix.printable import printable

_SYSTEMS = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
}
_LINES, _ASCII_LINES = "─│┼•", "-|+*"


class Screen:
    """Collects what is drawn; `flush` writes it in one go.

    Args:
        width: columns; default: what the terminal has at that moment, which a resize changes.
    """

    def __init__(self, stream: TextIO, width: int | None = None) -> None:
        console = Console(file=stream)
        self._stream = stream
        self._width = width
        self._system = _SYSTEMS.get(console.color_system or "")
        self._colourless = console.no_color
        self._waiting: list[str] = []
        can = _encodes(stream.encoding, _LINES)
        self.dash, self.bar, self.cross, self.bullet = tuple(_LINES if can else _ASCII_LINES)

    @property
    def width(self) -> int:
        return terminal.columns(self._stream) if self._width is None else self._width

    def draw(self, text: str, style: str = "") -> None:
        """Model text in a style of rich's, without what controls a terminal."""
        text = printable(text)
        if style and self._system is not None:
            look = Style.parse(style)
            look = look.without_color if self._colourless else look
            text = look.render(text, color_system=self._system)
        self._waiting.append(text)

    def newline(self) -> None:
        self._waiting.append("\n")

    def move_to(self, column: int) -> None:
        """Go to a column of the line, counted from 0, wherever the terminal thinks it is."""
        self._waiting.append(f"\x1b[{column + 1}G")

    def flush(self) -> None:
        """Write what waits.

        Raises:
            ResourceError: the stream cannot be written.
        """
        drawn = "".join(self._waiting)
        self._waiting.clear()
        if drawn:
            terminal.write_drawn(drawn, self._stream)


def _encodes(encoding: str | None, text: str) -> bool:
    try:
        text.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
