"""What every command here does around its work: messages to stderr, errors to exit codes.

Knows nothing of any command.
"""

import sys
from collections.abc import Callable

from qmix.errors import QmixError
from qmix.printable import escaped


def exit_code(name: str, work: Callable[[], int | None]) -> int:
    """Do the work of a command and return its exit code; an error is printed as one line.

    Args:
        name: starts the line of an error.
        work: returns an exit code, or None for 0.
    """
    try:
        return work() or 0
    except QmixError as error:
        say(f"{name}: {error}")
        return error.exit_code


def say(line: str) -> None:
    """Write a line to stderr at once."""
    sys.stderr.write(f"{escaped(line)}\n")
    sys.stderr.flush()


def numbers(text: str) -> tuple[int, ...]:
    """An option's whole numbers, such as 1,2,4.

    Raises:
        ValueError: one of them is none.
    """
    return tuple(int(word) for word in text.split(","))
