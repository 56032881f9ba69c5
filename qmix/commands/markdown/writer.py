"""Draws a reply as markdown while it comes: the only file here that knows the order of things.

A paragraph is drawn word by word, code line by line, a table when it ends. Blank lines and line
breaks stay where the model put them.
"""

from collections.abc import Iterable
from enum import Enum

from qmix.commands.markdown import structure
from qmix.commands.markdown.code import CodeLines
from qmix.commands.markdown.inline import InlineStream, parser
from qmix.commands.markdown.screen import Screen
from qmix.commands.markdown.structure import (
    CodeLine,
    Container,
    Fence,
    Heading,
    Item,
    Quote,
    Rule,
    TableRow,
)
from qmix.commands.markdown.table import TableStream
from qmix.commands.markdown.wrapping import Prefix, Run, Wrapper
from qmix.printable import printable

_RULE_COLUMNS = 40  # a line that is as wide as the terminal would wrap when it gets narrower
_DIM = "dim"
_HEADINGS = {1: "bold underline", 2: "bold underline"}


class _Line(Enum):
    """How far the line is that comes."""

    BEGINS = "what it is may still change"
    IS_TEXT = "the rest of it is a paragraph's"
    IS_LONG_CODE = "a line of code that is drawn as it comes"


class MarkdownWriter:
    """Draws the pieces of one reply on a screen."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._wrapper = Wrapper(screen)
        self._markdown = parser()
        self._inline = InlineStream(self._markdown)
        self._containers: list[Container] = []
        self._line: list[str] = []
        self._line_length = 0
        self._state = _Line.BEGINS
        self._paragraph = False
        self._fence: Fence | None = None
        self._code = CodeLines("")
        self._table: TableStream | None = None
        self._drawn = False
        self._blank: str | None = None  # what stands on the blank line that is due, if one is

    def write(self, piece: str) -> None:
        """Take more of the reply; what is certain of it is shown at once.

        Raises:
            ResourceError: the stream cannot be written.
        """
        first, *others = printable(piece).split("\n")
        self._more(first)
        for line in others:
            self._end_line()
            self._more(line)
        self._screen.flush()

    def close(self) -> None:
        """Show the rest, and end the last line."""
        if self._line or self._state is not _Line.BEGINS:
            self._end_line()
        self._end_leaf()
        self._end_fence()
        if not self._drawn:
            self._screen.newline()
        self._screen.flush()

    def _more(self, text: str) -> None:
        if not text:
            return
        if self._state is _Line.IS_TEXT:
            self._add_all(self._inline.feed(text))
            return
        if self._state is _Line.IS_LONG_CODE:
            self._screen.draw(text)
            return
        self._line.append(text)
        self._line_length += len(text)
        too_long = self._line_length > structure.LONGEST
        if self._fence is not None:
            if too_long:
                self._draw_line([Run("".join(self._line))], ends=False)
                self._take_line()
                self._state = _Line.IS_LONG_CODE
        elif too_long or not self._is_undecided():
            self._begin(self._take_line(), complete=False)

    def _is_undecided(self) -> bool:
        """Whether the line that has begun must be complete before anything of it is drawn."""
        code_may_begin = not self._paragraph and not self._is_in_list()
        line = structure.expanded("".join(self._line))
        return self._table is not None or structure.is_undecided(
            line, code_may_begin=code_may_begin
        )

    def _end_line(self) -> None:
        if self._state is _Line.IS_LONG_CODE:
            self._screen.newline()
        elif self._state is _Line.BEGINS:
            line = self._take_line()
            if self._fence is not None:
                self._code_line(self._fence, line)
            else:
                self._begin(line, complete=True)
        self._state = _Line.BEGINS

    def _take_line(self) -> str:
        line = structure.expanded("".join(self._line))
        self._line.clear()
        self._line_length = 0
        return line

    def _begin(self, line: str, *, complete: bool) -> None:
        """Decide what a line is, all of which or the beginning of which has come."""
        standing, rest = structure.inside(line, self._containers)
        if self._table is not None:
            if complete and standing == len(self._containers) and self._table.takes(rest):
                return
            self._end_table()
        if not rest.strip():
            self._end_leaf()
            quotes = (c for c in self._containers[:standing] if isinstance(c, Quote))
            self._blank = f"{self._screen.bar} " * sum(1 for _ in quotes)
            return
        if standing < len(self._containers):
            if self._paragraph and self._continues(rest):
                self._text(rest.lstrip())
                return
            self._end_leaf()
            del self._containers[standing:]
        rest = self._enter(rest)
        if not rest.strip():
            return
        self._leaf(rest, complete=complete)

    def _continues(self, rest: str) -> bool:
        """Whether a line that stands outside is still text of the paragraph inside."""
        return structure.container(rest, within_text=False, nested=True) is None and isinstance(
            structure.leaf(rest, within_text=True, nested=True), structure.Text
        )

    def _enter(self, rest: str) -> str:
        """Enter the quotes and items that begin a line; what is left of it."""
        while len(self._containers) < structure.DEEPEST:
            found = structure.container(
                rest, within_text=self._paragraph, nested=self._is_in_list()
            )
            if found is None:
                break
            self._end_leaf()
            self._containers.append(found[0])
            rest = found[1]
        return rest

    def _is_in_list(self) -> bool:
        return any(isinstance(container, Item) for container in self._containers)

    def _leaf(self, rest: str, *, complete: bool) -> None:
        found = structure.leaf(rest, within_text=self._paragraph, nested=self._is_in_list())
        if not complete or isinstance(found, structure.Text):
            self._text(rest.lstrip())
            return
        self._end_leaf()
        match found:
            case Heading(level, text):
                self._begin_block()
                inline = InlineStream(self._markdown)
                style = _HEADINGS.get(level, "bold")
                for group in (*inline.feed(text), inline.end()):
                    self._add(Run(run.text, f"{run.style} {style}".strip()) for run in group)
                self._wrapper.end_line()
            case Fence():
                self._fence, self._code = found, CodeLines(found.language)
                self._draw_rule(found.info)
            case Rule():
                self._draw_rule()
            case TableRow():
                self._table = TableStream(rest, self._markdown, self._screen, self._begin_block())
            case CodeLine(text):
                self._draw_line([Run(text)])

    def _text(self, text: str) -> None:
        """A line of a paragraph, or the beginning of one."""
        if self._paragraph:
            self._add_all(self._inline.feed("\n"))
        else:
            self._begin_block()
        self._paragraph = True
        self._state = _Line.IS_TEXT
        self._add_all(self._inline.feed(text))

    def _add_all(self, groups: Iterable[Iterable[Run]]) -> None:
        for group in groups:
            self._add(group)

    def _add(self, runs: Iterable[Run]) -> None:
        for run in runs:
            self._wrapper.add(run)
        self._wrapper.end_word()

    def _end_leaf(self) -> None:
        """End the paragraph or the table that is open."""
        self._end_table()
        if self._paragraph:
            self._add(self._inline.end())
            self._wrapper.end_line()
            self._paragraph = False

    def _begin_block(self) -> tuple[Prefix, Prefix]:
        """Draw a blank line where one came, and set what stands before the block's lines.

        Returns what stands before the first of them, and before the others.
        """
        first, others = self._prefixes()
        if self._blank is not None and self._drawn:
            self._screen.draw(self._blank.rstrip(), _DIM)
            self._screen.newline()
        self._drawn, self._blank = True, None
        self._wrapper.begin(first, others)
        return first, others

    def _prefixes(self) -> tuple[Prefix, Prefix]:
        """What stands before the next line of the containers, and before those that follow."""
        first: list[Run] = []
        others: list[Run] = []
        for container in self._containers:
            if isinstance(container, Quote):
                first.append(Run(f"{self._screen.bar} ", _DIM))
                others.append(first[-1])
                continue
            marker = container.marker
            if marker[0] in "-*+":
                marker = f"{self._screen.bullet} "
            others.append(Run(" " * len(marker)))
            first.append(others[-1] if container.drawn else Run(marker))
            container.drawn = True
        return tuple(first), tuple(others)

    def _draw_line(self, runs: Iterable[Run], *, ends: bool = True) -> None:
        """A line that is not wrapped."""
        first, _ = self._begin_block()
        for run in (*first, *runs):
            self._screen.draw(run.text, run.style)
        if ends:
            self._screen.newline()

    def _draw_rule(self, title: str = "") -> None:
        dash = self._screen.dash
        title = f"{dash * 2} {title} " if title else ""
        columns = min(self._screen.width - 1, _RULE_COLUMNS) - 2 * len(self._containers)
        self._draw_line([Run(title + dash * (columns - len(title)), _DIM)])

    def _code_line(self, fence: Fence, line: str) -> None:
        standing, rest = structure.inside(line, self._containers)
        quotes = self._containers[standing:]
        if any(isinstance(container, Quote) for container in quotes):
            self._end_fence()
            self._begin(line, complete=True)
            return
        rest = rest[min(structure.indentation(rest), fence.indent) :]
        if fence.is_closed_by(rest):
            self._end_fence()
        else:
            self._draw_line(self._code.line(rest))

    def _end_fence(self) -> None:
        if self._fence is not None:
            self._draw_rule()
            self._fence = None

    def _end_table(self) -> None:
        """Draw the rows that wait; the one row of what became no table begins a paragraph."""
        if self._table is None:
            return
        text = self._table.end()
        self._table = None
        if text is not None:
            self._paragraph = True
            self._add_all(self._inline.feed(text.lstrip()))
