"""What every command here does around its work: records, messages to stderr, errors to exit codes.

Knows nothing of any command.
"""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from qmix import strict_json
from qmix.errors import QmixError
from qmix.printable import escaped

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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


def publish(record: "DataclassInstance", file: Path | None) -> None:
    """Print a record as its text, and write its fields to a file if one is given.

    Raises:
        WriteError: the file cannot be written.
    """
    sys.stdout.write(str(record))
    if file is not None:
        strict_json.write(file, asdict(record), indent=1)


def command_line(name: str) -> str:
    """How this process's command, `python -m qmix.evals.NAME`, was called, as a shell takes it."""
    return shlex.join(("python", "-m", f"qmix.evals.{name}", *sys.argv[1:]))


def numbers(text: str) -> tuple[int, ...]:
    """An option's whole numbers, such as 1,2,4.

    Raises:
        ValueError: one of them is none.
    """
    return tuple(int(word) for word in text.split(","))
