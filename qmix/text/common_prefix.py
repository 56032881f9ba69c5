"""How far two lists of ids begin alike. Standard library only."""

from array import array
from typing import TypeVar

Ids = TypeVar("Ids", list[int], tuple[int, ...], "array[int]")


def common_prefix(first: Ids, second: Ids) -> int:
    """Ids from the first on that are equal, by halves: slices are compared in one piece."""
    equal, most = 0, min(len(first), len(second))
    while equal < most:
        middle = (equal + most + 1) // 2
        if first[equal:middle] == second[equal:middle]:
            equal = middle
        else:
            most = middle - 1
    return equal
