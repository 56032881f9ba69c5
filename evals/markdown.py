"""Tables: markdown for files and pipes, aligned columns for a terminal.

Knows nothing of what is in them.
"""

from collections.abc import Iterable, Sequence

from qmix.printable import escaped


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a header, a rule and a line for each row."""
    return "".join(map(row, (header, ["---"] * len(header), *rows)))


def row(cells: Sequence[str]) -> str:
    """One line of a table, newline included; cells are escaped."""
    return "| " + " | ".join(map(escaped, cells)) + " |\n"


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same in columns, the first to the left and the others to the right.

    A column that says nothing, "-" in every row, is left out.
    """
    lines = [tuple(map(escaped, cells)) for cells in rows]
    kept = [i for i in range(len(header)) if any(cells[i] != "-" for cells in lines)]
    table = [tuple(cells[i] for i in kept) for cells in (tuple(header), *lines)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text = ""
    for first, *others in table:
        numbers = zip(others, widths[1:], strict=True)
        text += "  ".join((f"{first:{widths[0]}}", *(f"{c:>{w}}" for c, w in numbers))) + "\n"
    return text
