"""A page of HTML that stands alone: sections of words, tables, figures and quotations.

Everything is escaped but the SVG of `qmix.pages.svg`. Nothing is loaded from elsewhere, and no
script runs. The words of a page, its order and its figures come from the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from qmix.pages import svg, theme
from qmix.printable import escaped, printable

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of text under a header. Columns whose cells are numbers are set to the right."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    kind = "table"

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column holds figures."""
        return tuple(
            all(row[column][:1] in _FIGURES for row in self.rows)
            for column in range(len(self.header))
        )


@dataclass(frozen=True)
class Picture:
    """A chart with its caption, and the same figures as tables.

    Attributes:
        name: unlike those of all other pictures of the page.
        alt: what a reader who does not see it should know.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: "Figure"
    tables: tuple[Table, ...] = ()
    kind = "picture"

    @property
    def svg(self) -> str:
        """The chart as an element; the only text that a page does not escape."""
        return svg.inline(self.figure, self.name, self.alt)


@dataclass(frozen=True)
class Quotation:
    """A word in its context, and facts about it."""

    before: str
    word: str
    after: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Quotations:
    """Quotations under one title."""

    title: str
    items: tuple[Quotation, ...]
    kind = "quotations"


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, paragraphs, and what they speak of."""

    title: str
    words: tuple[str, ...] = ()
    items: tuple[Table | Picture | Quotations, ...] = ()


@dataclass(frozen=True)
class Page:
    """A whole page; `facts` are pairs of a name and what it is."""

    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]


_FIGURES = frozenset("0123456789-+ ") | {""}


def html(page: Page) -> bytes:
    """The page as UTF-8: the same bytes for the same page."""
    text = _template().render(page=page, stylesheet=theme.stylesheet() + svg.STYLE)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()).encode() + b"\n"


def _shown(word: str) -> str:
    """A word that is underlined, with a sign for the end of a line."""
    return printable(word).replace("\n", "↵\n")


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # One line of words; a quotation keeps its lines.
    environment.filters |= {"one_line": escaped, "quoted": printable, "shown": _shown}
    source = resources.files("qmix.pages").joinpath("page.html.jinja").read_text("utf-8")
    return environment.from_string(source)


def series_table(
    caption: str, first: str, places: Sequence[str], columns: Sequence[tuple[str, Sequence[str]]]
) -> Table:
    """A table with a row a place and a column a series."""
    header = (first, *(name for name, _ in columns))
    rows = tuple(
        (place, *(cells[index] for _, cells in columns)) for index, place in enumerate(places)
    )
    return Table(caption, header, rows)
