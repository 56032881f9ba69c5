"""Tables in markdown. Knows nothing of what is in them."""

from collections.abc import Iterable, Sequence

from qmix.printable import escaped


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a header, a rule and a line for each row."""
    return "".join(map(row, (header, ["---"] * len(header), *rows)))


def row(cells: Sequence[str]) -> str:
    """One line of a table, newline included; cells are escaped."""
    return "| " + " | ".join(map(escaped, cells)) + " |\n"
