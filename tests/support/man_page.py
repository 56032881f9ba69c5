"""Write the manual page of `qmix`, from what --help-all shows.

    python -m tests.support.man_page        # writes docs/qmix.1; read it with: man docs/qmix.1

tests/commands/test_man_page.py keeps it in step with the commands.
"""

from collections.abc import Iterator
from typing import Any

import typer

from qmix import cli
from qmix.commands.help_page import HelpPage
from tests.support.house import ROOT

PAGE = ROOT / "docs" / "qmix.1"


def walk(command: Any, context: Any) -> Iterator[tuple[Any, Any]]:
    """A group or command, and every command below it that is listed, each with its context."""
    yield command, context
    if hasattr(command, "list_commands"):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child.hidden:
                continue
            inner = type(context)(child, parent=context, info_name=name, **child.context_settings)
            yield from walk(child, inner)


def pages() -> dict[str, tuple[Any, Any]]:
    """(command, context) of each path, such as "qmix trace record"."""
    command = typer.main.get_command(cli.app)
    context = command.make_context("qmix", [], resilient_parsing=True)
    return {context.command_path: (command, context) for command, context in walk(command, context)}


def text() -> str:
    """The manual page in roff."""
    whole = {path: HelpPage.of(*found) for path, found in pages().items()}
    top = whole.pop("qmix")
    lines = [
        '.TH QMIX 1 "" "qmix" "User Commands"',
        ".SH NAME",
        f"qmix \\- {_escaped(top.text[0].rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B qmix\n{_escaped(top.usage.removeprefix('qmix '))}",
        ".SH DESCRIPTION",
        _escaped(top.closing),
        *_panels(top, ".SH"),
    ]
    for path, page in whole.items():
        lines += [f".SH {_escaped(path).upper()}", ".B " + _escaped(page.usage)]
        lines += [line for paragraph in page.text for line in (".PP", _escaped(paragraph))]
        lines += [
            line for example in page.examples for line in (".PP", ".RS", _escaped(example), ".RE")
        ]
        lines += _panels(page, ".SS")
    return "\n".join((*lines, ""))


def _panels(page: HelpPage, heading: str) -> Iterator[str]:
    for panel in page.panels:
        yield f"{heading} {_escaped(panel.title)}"
        for name, what in panel.rows:
            yield ".TP"
            yield f".B {_escaped(name)}"
            yield _escaped(what)


def _escaped(text: str) -> str:
    """Text that roff prints as it is, in one line."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
