"""What the beginning of a line says: in which quotes and lists it stands, and what begins there.

Reads single lines; knows nothing of what is drawn. Where a model's habits and CommonMark differ
(a list indented by two below `1.`), the habit is understood.
"""

import re
from dataclasses import dataclass

DEEPEST = 8  # quotes and lists in each other; deeper marks are text
LONGEST = 4096  # characters of a line that may wait for its end
CODE_INDENT = 4

_QUOTE = re.compile(r" {0,3}> ?")
_ITEM = re.compile(r"( *)([-*+]|\d{1,9}[.)])(?: {1,4}(?! )|[ \t]|$)")
_HEADING = re.compile(r" {0,3}(#{1,6})(?: +|$)(.*?)(?: +#+)? *$")
_RULE = re.compile(r" {0,3}(?:(?:-[ \t]*){3,}|(?:_[ \t]*){3,}|(?:\*[ \t]*){3,})$")
_UNDERLINE = re.compile(r" {0,3}(?:=+|-+) *$")
_FENCE = re.compile(r" *(`{3,}(?=[^`]*$)|~{3,})(.*)$")
_TABLE_RULE = re.compile(r" *\|? *:?-+:? *(?:\| *:?-+:? *)*\|? *$")
_CONTAINERS = re.compile(r"(?: *(?:>|[-*+](?=[ \t])|\d{1,9}[.)](?=[ \t])))* *")
_UNDECIDED = re.compile(
    r"#{1,6}$|#{1,6} |`{1,2}$|```|~~~|~{1,2}$|[-*_=+][-*_= \t]*$|\d{1,9}[.)]?$|\|"
)


@dataclass(frozen=True)
class Quote:
    """A quotation."""


@dataclass
class Item:
    """An item of a list.

    Attributes:
        marker: as it is drawn, with the space behind it.
        indent: columns before the marker.
        content: columns before what the item holds.
        drawn: whether the marker has been.
    """

    marker: str
    indent: int
    content: int
    drawn: bool = False


Container = Quote | Item


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Fence:
    """The opening of a block of code."""

    mark: str
    info: str
    indent: int

    @property
    def language(self) -> str:
        return self.info.partition(" ")[0]

    def is_closed_by(self, line: str) -> bool:
        text = line.strip()
        return len(text) >= len(self.mark) and not text.strip(self.mark[0])


@dataclass(frozen=True)
class Rule:
    """A line across."""


@dataclass(frozen=True)
class TableRow:
    """What may be the first row of a table."""


@dataclass(frozen=True)
class CodeLine:
    """A line of code by its indentation."""

    text: str


@dataclass(frozen=True)
class Text:
    text: str


Leaf = Heading | Fence | Rule | TableRow | CodeLine | Text


def is_undecided(line: str, *, code_may_begin: bool) -> bool:
    """Whether the rest of a line may still change what begins with it.

    Args:
        code_may_begin: an indented line is code, which is drawn when it is complete.
    """
    if len(line) > LONGEST:
        return False
    if code_may_begin and indentation(line) >= CODE_INDENT:
        return True
    found = _CONTAINERS.match(line)
    assert found is not None
    rest = line[found.end() :]
    return not rest or _UNDECIDED.match(rest) is not None


def expanded(line: str) -> str:
    """The line with its leading tabs as spaces."""
    text = line.lstrip(" \t")
    return line[: len(line) - len(text)].expandtabs(4) + text


def inside(line: str, containers: list[Container]) -> tuple[int, str]:
    """How many of the containers a line stands in, and what is left of it."""
    for count, container in enumerate(containers):
        if isinstance(container, Quote):
            found = _QUOTE.match(line)
            if found is None:
                return count, line
            line = expanded(line[found.end() :])
        elif line.strip():
            indent = indentation(line)
            if indent < min(container.content, container.indent + 2):
                return count, line
            line = line[min(indent, container.content) :]
    return len(containers), line


def container(line: str, *, within_text: bool, nested: bool) -> tuple[Container, str] | None:
    """The quote or item that begins a line, and the rest of it.

    Args:
        within_text: a paragraph goes on, which an empty item and a number but 1 do not end.
        nested: in a list, where any indentation may stand before a marker.
    """
    if found := _QUOTE.match(line):
        return Quote(), expanded(line[found.end() :])
    found = _ITEM.match(line)
    if found is None or _RULE.match(line) or (len(found[1]) > 3 and not nested):
        return None
    rest = line[found.end() :]
    if within_text and (not rest.strip() or (found[2][0].isdigit() and found[2][:-1] != "1")):
        return None
    marker = f"{found[2]} "
    content = found.end() if rest else len(found[1]) + len(marker)
    return Item(marker, len(found[1]), content), rest


def leaf(line: str, *, within_text: bool, nested: bool) -> Leaf:
    """What stands on a line that is not blank, without its containers."""
    if found := _FENCE.match(line):
        return Fence(found[1], found[2].strip(), indentation(line))
    if _RULE.match(line) or (within_text and _UNDERLINE.match(line)):
        return Rule()
    if found := _HEADING.match(line):
        return Heading(len(found[1]), found[2])
    if not within_text and line.lstrip().startswith("|"):
        return TableRow()
    if not within_text and not nested and indentation(line) >= CODE_INDENT:
        return CodeLine(line[CODE_INDENT:])
    return Text(line.lstrip(" \t"))


def is_table_rule(line: str) -> bool:
    """Whether a line is what stands between a table's header and its rows."""
    return "-" in line and _TABLE_RULE.match(line) is not None


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
