"""Words put on lines of a terminal's width, each as soon as it is complete.

Knows no markdown. A word that is wider than a line is left to the terminal, which keeps it whole
for who copies it.
"""

import re
from dataclasses import dataclass
from typing import Protocol

from qmix.commands.markdown.cells import breakable, cells, folded, parts

_SPACES = re.compile(r"([ \t]+)")


@dataclass(frozen=True)
class Run:
    """Text in one style; the style is in rich's words. A newline stands alone."""

    text: str
    style: str = ""


Prefix = tuple[Run, ...]  # what stands before a line


class Surface(Protocol):
    """What lines are drawn on."""

    @property
    def width(self) -> int:
        """Columns."""

    def draw(self, text: str, style: str = "") -> None:
        """Put text behind what stands on the line."""

    def newline(self) -> None:
        """End the line."""


class Wrapper:
    """Fills lines word by word.

    Args:
        fold: break words that are wider than a line.
    """

    def __init__(self, surface: Surface, *, fold: bool = False) -> None:
        self._surface = surface
        self._fold = fold
        self._first: Prefix = ()
        self._others: Prefix = ()
        self._word: list[Run] = []
        self._space = ""
        self._column = 0
        self._empty = True  # nothing but a prefix stands on the line

    def begin(self, first: Prefix, others: Prefix) -> None:
        """Set what stands before the next line, and before those that follow it."""
        self._first, self._others = first, others

    def add(self, run: Run) -> None:
        """Take more text; a word is drawn when a space or `end_word` has ended it."""
        if run.text == "\n":
            self.end_line()
            return
        for index, text in enumerate(_SPACES.split(run.text)):
            if index % 2:
                self.end_word()
                self._space = self._space or text.replace("\t", " ")
            elif text:
                for part in parts(text):
                    if self._word and breakable(self._word[-1].text[-1], part[0]):
                        self.end_word()
                    self._word.append(Run(part, run.style))

    def end_word(self) -> None:
        """Draw what has been taken; a line may end behind it."""
        if not self._word:
            return
        needed = sum(cells(run.text) for run in self._word)
        width = self._surface.width
        if not self._empty and self._column + cells(self._space) + needed > width:
            self._break()
        if self._empty:
            self._prefix()
        elif self._space:
            self._surface.draw(self._space)
            self._column += cells(self._space)
        for run in self._word:
            self._place(run, width)
        if self._column > width:  # the terminal has gone on to another line
            self._column = (self._column - 1) % max(width, 1) + 1
        self._word.clear()
        self._space, self._empty = "", False

    def end_line(self) -> None:
        """End the line; one on which nothing stands is drawn as its prefix."""
        self.end_word()
        if self._empty:
            self._prefix()
        self._break()

    def _place(self, run: Run, width: int) -> None:
        if self._fold and self._column + cells(run.text) > width:
            for part in folded(run.text, max(1, width)):
                if self._column + cells(part) > width and self._column:
                    self._break()
                    self._prefix()
                self._surface.draw(part, run.style)
                self._column += cells(part)
            return
        self._surface.draw(run.text, run.style)
        self._column += cells(run.text)

    def _prefix(self) -> None:
        for run in self._first:
            self._surface.draw(run.text, run.style)
        self._column = sum(cells(run.text) for run in self._first)
        self._first = self._others

    def _break(self) -> None:
        self._surface.newline()
        self._space, self._column, self._empty = "", 0, True
