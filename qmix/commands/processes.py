"""The option --processes: the same command in several processes of this machine.

Heavy imports stay inside the functions.
"""

import sys
from typing import Annotated

import typer

PANEL = "Several processes"
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        metavar="N",
        help="Share the work among N processes. Needs the extra scale.",
        show_default="1",
        rich_help_panel=PANEL,
    ),
]


def prints() -> bool:
    """Whether this process prints: the first of several does."""
    from qmix.processes.group import is_first

    return is_first()


def launched(processes: int | None, *, kept: str) -> bool:
    """Whether this command has been run by several processes, and is done.

    Args:
        kept: what is said of a lost run's finished work.

    Raises:
        QmixError: a process was lost.
    """
    from qmix.processes import group, launch

    if processes in (None, 1) and group.processes() == 1:
        return False
    group.check_extra()
    if group.processes() > 1:
        return False
    assert processes is not None
    try:
        command = launch.without_option(sys.argv[1:], "--processes")
        launch.launch(command, processes, kept=kept)
    except launch.EndedError as ended:
        raise typer.Exit(ended.exit_code) from None
    return True
