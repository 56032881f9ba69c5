"""How a reply reaches its reader: drawn as markdown on a terminal, byte for byte elsewhere."""

from dataclasses import dataclass
from typing import Protocol, TextIO

from qmix.commands import terminal


class ReplyWriter(Protocol):
    """What the pieces of one reply are written to."""

    def write(self, piece: str) -> None:
        """Take more of the reply; what is certain of it is shown at once.

        Raises:
            ResourceError: the stream cannot be written.
        """

    def close(self) -> None:
        """Show the rest, and end the last line."""


@dataclass(frozen=True)
class RawWriter:
    """Writes a reply as it is, without what controls a terminal."""

    stream: TextIO

    def write(self, piece: str) -> None:
        terminal.write(piece, self.stream)

    def close(self) -> None:
        terminal.write("\n", self.stream)


def reply_writer(stream: TextIO, *, plain: bool = False) -> ReplyWriter:
    """The writer for a stream.

    Args:
        plain: write the reply as it is, also on a terminal.
    """
    if plain or terminal.is_dumb() or not stream.isatty():
        return RawWriter(stream)
    # Only who reads on a terminal waits for markdown-it and pygments.
    from qmix.commands.markdown.screen import Screen
    from qmix.commands.markdown.writer import MarkdownWriter

    return MarkdownWriter(Screen(stream))
