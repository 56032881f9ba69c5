"""A table in columns: their widths from its cells, rows wrapped within them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt

from qmix.commands.markdown.cells import cells
from qmix.commands.markdown.inline import runs
from qmix.commands.markdown.screen import Screen
from qmix.commands.markdown.structure import is_table_rule
from qmix.commands.markdown.wrapping import Prefix, Run, Wrapper

_NARROWEST = 3
_BETWEEN = 3  # columns of a bar and the spaces around it
_ROWS = 200  # that wait for the widths of the columns; later rows get the widths of these
_COLUMNS = 50
Cell = Sequence[Run]


class TableStream:
    """The lines of a table as they come, or of what may become one.

    Args:
        row: the first line.
        prefixes: what stands before the first line that is drawn, and before the others.
    """

    def __init__(
        self, row: str, markdown: MarkdownIt, screen: Screen, prefixes: tuple[Prefix, Prefix]
    ) -> None:
        self._head = [row]
        self._lines: list[str] = []
        self._markdown = markdown
        self._screen = screen
        self._first, self._others = prefixes
        self._widths: Sequence[int] | None = None
        self._as_text = False

    def takes(self, line: str) -> bool:
        """Whether the next line belongs to the table; then it has been taken."""
        if len(self._head) == 1:
            if not is_table_rule(line) or _parsed([*self._head, line], self._markdown) is None:
                return False
            self._head.append(line)
            self._as_text = self._head[0].count("|") > _COLUMNS
            return True
        if "|" not in line:
            return False
        self._lines.append(line)
        if len(self._lines) == _ROWS:
            self._draw()
        return True

    def end(self) -> str | None:
        """Draw what waits; the first line, if no table came of it."""
        if len(self._head) == 1:
            return self._head[0]
        if self._lines or self._widths is None:
            self._draw()
        return None

    def _draw(self) -> None:
        """Draw the lines that wait, with the header above the first of them."""
        begins = self._widths is None
        table = None if self._as_text else _parsed([*self._head, *self._lines], self._markdown)
        if table is not None and begins:
            self._widths = _widths(table, self._screen.width - _width(self._others))
        if table is None or self._widths is None:
            self._draw_source(self._head + self._lines if begins else self._lines)
            self._as_text, self._widths = True, ()
        else:
            header, *rows = table.rows
            if begins:
                self._draw_row([_bold(cell) for cell in header], table.alignments)
                self._draw_rule(self._widths)
            for row in rows:
                self._draw_row(row, table.alignments)
        self._lines.clear()

    def _draw_source(self, lines: Sequence[str]) -> None:
        """Lines as they came: there are more columns than fit."""
        for line in lines:
            self._draw_prefix()
            self._screen.draw(line)
            self._screen.newline()

    def _draw_rule(self, widths: Sequence[int]) -> None:
        self._draw_prefix()
        dash, cross = self._screen.dash, self._screen.cross
        self._screen.draw(f"{dash}{cross}{dash}".join(dash * width for width in widths), "dim")
        self._screen.newline()

    def _draw_row(self, row: Sequence[Cell], alignments: Sequence[str]) -> None:
        """A row on as many lines as its longest cell needs.

        Behind a cell whose width terminals may not agree on, the next one is put on its column.
        """
        widths = self._widths
        assert widths is not None
        wrapped = [_wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, wrapped))):
            column = self._draw_prefix()
            certain = True
            for index, (lines, width) in enumerate(zip(wrapped, widths, strict=True)):
                line = lines[number] if number < len(lines) else ()
                if index:
                    if not certain:
                        self._screen.move_to(column)
                    self._screen.draw(f" {self._screen.bar} ", "dim")
                    column += _BETWEEN
                self._draw_cell(line, width, alignments[index], last=index == len(widths) - 1)
                certain = certain and all(run.text.isascii() for run in line)
                column += width
            self._screen.newline()

    def _draw_cell(self, line: Cell, width: int, alignment: str, *, last: bool) -> None:
        free = max(0, width - _width(line))
        left = {"right": free, "center": free // 2}.get(alignment, 0)
        self._screen.draw(" " * left)
        for run in line:
            self._screen.draw(run.text, run.style)
        if not last:
            self._screen.draw(" " * (free - left))

    def _draw_prefix(self) -> int:
        prefix, self._first = self._first, self._others
        for run in prefix:
            self._screen.draw(run.text, run.style)
        return _width(prefix)


@dataclass(frozen=True)
class _Table:
    """Cells row by row, the header's first, and how each column is aligned."""

    rows: Sequence[Sequence[Cell]]
    alignments: Sequence[str]


def _parsed(lines: Sequence[str], markdown: MarkdownIt) -> _Table | None:
    """The table that lines of markdown are, if they are one."""
    tokens = markdown.parse("\n".join(lines) + "\n")
    if not tokens or tokens[0].type != "table_open":
        return None
    rows: list[list[Cell]] = []
    alignments: list[str] = []
    for before, token in itertools.pairwise(tokens):
        if token.type == "tr_open":
            rows.append([])
        if before.type in ("th_open", "td_open"):
            rows[-1].append(list(runs(token.children or ())))
            if before.type == "th_open":
                alignments.append(str(before.attrGet("style") or "").removeprefix("text-align:"))
    return _Table(rows, alignments)


def _widths(table: _Table, available: int) -> Sequence[int] | None:
    """Columns' widths that fit, the widest cut first; None if there are too many columns."""
    count = len(table.alignments)
    space = available - _BETWEEN * (count - 1)
    if space < _NARROWEST * count:
        return None
    natural = [
        max(1, *(_natural_width(row[index]) for row in table.rows)) for index in range(count)
    ]
    return _fitting(natural, space)


def _bold(cell: Cell) -> Cell:
    return [Run(run.text, f"{run.style} bold".strip()) for run in cell]


def _width(line: Cell) -> int:
    return sum(cells(run.text) for run in line)


def _natural_width(cell: Cell) -> int:
    """Columns of the cell's longest line."""
    widths = [0]
    for run in cell:
        if run.text == "\n":
            widths.append(0)
        else:
            widths[-1] += cells(run.text)
    return max(widths)


def _fitting(natural: Sequence[int], space: int) -> Sequence[int]:
    """The widths, of which the greatest are cut to one height so that all fit."""
    low, high = 1, max(natural)
    while low < high:
        cut = (low + high + 1) // 2
        if sum(min(width, cut) for width in natural) <= space:
            low = cut
        else:
            high = cut - 1
    widths = [min(width, low) for width in natural]
    spare = space - sum(widths)
    for index, width in enumerate(natural):
        if width > low and spare > 0:
            widths[index] += 1
            spare -= 1
    return widths


class _Lines:
    """Lines of runs, as a surface for the wrapper."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines: list[list[Run]] = [[]]

    def draw(self, text: str, style: str = "") -> None:
        self.lines[-1].append(Run(text, style))

    def newline(self) -> None:
        self.lines.append([])


def _wrapped(cell: Cell, width: int) -> Sequence[Cell]:
    surface = _Lines(width)
    wrapper = Wrapper(surface, fold=True)
    for run in cell:
        wrapper.add(run)
    wrapper.end_word()
    return surface.lines
