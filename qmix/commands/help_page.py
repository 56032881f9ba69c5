"""The help of every command: a page of 40 lines at most, from what typer knows of its options.

Options come in panels, the most important first. Panels that do not fit the page are named in its
last line, and --help-all shows them too. Rich's own page takes as long to import as all the rest of
a command line. Knows no command.
"""

import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from qmix.commands import terminal

_Function = TypeVar("_Function", bound=Callable[..., Any])

LINES = 40
WIDEST = 120  # columns; longer lines are hard to read
_NAMES = 30  # columns of the options' names at most
_EXAMPLES = re.compile(r"^Examples?:$", re.MULTILINE)
_ALL = "--help-all"
_TYPES = (("<list[str]>", "<str>"), (" range>", ">"))  # as typer says them, and we


@dataclass(frozen=True)
class Panel:
    """Options or commands that go together: (name, what it does) of each."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class HelpPage:
    """What is said of a command.

    Attributes:
        text: paragraphs; the first is one sentence.
        examples: command lines.
        panels: arguments, options or commands, the most important first.
        left_out: the names in panels that do not fit.
        closing: a paragraph below all.
    """

    usage: str
    text: tuple[str, ...]
    examples: tuple[str, ...]
    panels: tuple[Panel, ...]
    left_out: tuple[str, ...] = ()
    closing: str = ""

    @classmethod
    def of(cls, command: Any, context: Any) -> "HelpPage":
        """The page of a typer command or group."""
        text, *rest = _EXAMPLES.split(inspect.cleandoc((command.help or "").replace("\b\n", "")))
        examples = rest[0].splitlines() if rest else ()
        first = () if isinstance(command, TyperGroup) else ("Arguments", "Options")
        return cls(
            usage=f"{context.command_path} {' '.join(_pieces(command, context))}",
            text=tuple(" ".join(part.split()) for part in text.strip().split("\n\n")),
            examples=tuple(line.strip() for line in examples if line.strip()),
            panels=tuple(_panels(_rows(command, context), first)),
            closing=command.epilog or "",
        )

    def lines(self, width: int) -> list[str]:
        """The whole page."""
        lines = textwrap.wrap(f"Usage: {self.usage}", width, subsequent_indent=" " * 7)
        for paragraph in self.text:
            lines += ["", *_filled(paragraph, width)]
        if self.examples:
            lines += ["", "Examples:" if len(self.examples) > 1 else "Example:"]
            lines += [f"  {example}" for example in self.examples]
        for panel in self.panels:
            lines += ["", f"{panel.title}:", *_definitions(panel.rows, width)]
        if self.left_out:
            lines += ["", *_filled(f"{_ALL} shows more: {', '.join(self.left_out)}", width)]
        return lines + (["", *_filled(self.closing, width)] if self.closing else [])

    def fitted(self, width: int) -> list[str]:
        """The page without its last panels, if it has more lines than LINES."""
        page = self
        while len(page.lines(width)) > LINES and len(page.panels) > 1:
            *kept, dropped = page.panels
            names = tuple(name.partition(",")[0].partition(" ")[0] for name, _ in dropped.rows)
            page = replace(page, panels=tuple(kept), left_out=(*names, *page.left_out))
        return page.lines(width)


def _pieces(command: Any, context: Any) -> Iterator[str]:
    """What follows a command's name."""
    for param in command.params:
        if param.param_type_name == "argument":
            name = param.metavar or str(param.name).upper()
            yield name if param.required else f"[{name}]"
    if isinstance(command, TyperGroup):
        yield "COMMAND ..."
    yield "[OPTIONS]"


def _rows(command: Any, context: Any) -> Iterator[tuple[str, str, str]]:
    """(panel, name, help) of each argument, option and command."""
    for name in command.list_commands(context) if isinstance(command, TyperGroup) else ():
        child = command.get_command(context, name)
        if not child.hidden:
            first = inspect.cleandoc(child.help or "").partition("\n\n")[0]
            yield child.rich_help_panel or "Commands", name, " ".join(first.split())
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is None or param.opts == [_ALL]:
            continue
        name, text = record
        default = "Options"
        if param.param_type_name == "argument":
            default, name = "Arguments", param.metavar or str(param.name).upper()
            text = text.replace("  [required]", "")
        elif param is command.get_help_option(context):
            name, text = "-h, --help", f"Show this page; {_ALL} shows every option."
        for theirs, ours in _TYPES:
            name = name.replace(theirs, ours)
        text = re.sub(r"\[default: \((.*)\)\]", r"[default: \1]", text)
        yield getattr(param, "rich_help_panel", None) or default, name, text


def _panels(rows: Iterable[tuple[str, str, str]], first: Sequence[str]) -> Iterator[Panel]:
    """The panels in the order of their first rows, but those of these titles before others."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for panel, name, text in rows:
        grouped.setdefault(panel, []).append((name, text))
    for title in sorted(grouped, key=lambda title: title not in first):
        yield Panel(title, tuple(grouped[title]))


def _filled(text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def _definitions(rows: Sequence[tuple[str, str]], width: int) -> Iterator[str]:
    """Two columns; a long name has a line of its own."""
    column = 2 + min(_NAMES, max(len(name) for name, _ in rows)) + 2
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
        if len(name) + 4 > column:
            yield f"  {name}"
        else:
            wrapped[0] = f"{f'  {name}':{column}}{wrapped[0]}"
            yield wrapped.pop(0).rstrip()
        yield from (f"{'':{column}}{line}" for line in wrapped)


class _Helped:
    """What a command and a group share: their page, and --help-all.

    The option is a copy of --help: its class depends on typer's version.
    """

    _help_all: Any = None

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        if self._help_all is None:  # one object: the parser compares by identity
            self._help_all = copy.copy(params[-1])
            self._help_all.opts, self._help_all.secondary_opts = [_ALL], []
            self._help_all.name, self._help_all.callback = "help_all", _show_all
        return [*params, self._help_all]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write("\n".join(HelpPage.of(self, ctx).fitted(formatter.width)))


def _show_all(context: typer.Context, _: object, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        lines = HelpPage.of(context.command, context).lines(context.make_formatter().width)
        terminal.write("\n".join((*lines, "")))
        raise typer.Exit


class HelpedCommand(_Helped, TyperCommand):
    """A command with a page of its own."""


class HelpedGroup(_Helped, TyperGroup):
    """A group of commands with a page of its own."""


class HelpedApp(typer.Typer):
    """A typer application all of whose commands have such pages."""

    def __init__(self, **settings: Any) -> None:
        context = {"help_option_names": ["-h", "--help"], "max_content_width": WIDEST}
        super().__init__(
            cls=HelpedGroup,
            context_settings=context,
            invoke_without_command=True,
            rich_markup_mode=None,
            **settings,
        )

    def command(self, name: str | None = None, **settings: Any) -> Callable[[_Function], _Function]:
        """As typer's."""
        return super().command(name, cls=HelpedCommand, **settings)
