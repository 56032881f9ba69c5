"""Commands that change the conversation: its last turn, its beginning, its system prompt."""

from typing import TYPE_CHECKING

from qmix.commands.chat import settings
from qmix.commands.line_editing.external_editor import edited

if TYPE_CHECKING:
    from qmix.commands.repl import Repl

_SHOWN = 60  # characters of a message that is named


def clear(repl: "Repl", argument: str) -> None:
    repl.session.clear()
    repl.attached.clear()
    repl.notice("forgotten")


def system(repl: "Repl", argument: str) -> None:
    if argument:
        repl.session.system = None if argument == "-" else argument
    repl.notice(f"system: {repl.session.system or '(none)'}")


def set_value(repl: "Repl", argument: str) -> None:
    config = repl.session.config
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if value:
        new = settings.changed(config, name, value.strip())
        repl.session.config = new
        old = settings.value_of(config, name)
        repl.notice(f"{name}: {settings.value_of(new, name)}, was {old}")
        return
    for each in [name] if name else settings.SETTINGS:
        repl.notice(f"{each:20} {settings.shown(config, each)}")


def regenerate(repl: "Repl", argument: str) -> None:
    temperature = None
    if argument:
        one = settings.changed(repl.session.config, "temperature", argument)
        temperature = one.temperature if one.do_sample else 0.0
    elif not repl.session.config.do_sample:
        repl.notice("temperature 0 gives the same reply again; /regen 0.8 draws another")
    repl.answer(repl.session.prepare_again(temperature=temperature))


def undo(repl: "Repl", argument: str) -> None:
    repl.notice(f"removed: {_beginning(repl.session.undo().user)}")


def edit(repl: "Repl", argument: str) -> None:
    turns = repl.session.turns
    before = turns[-1].user if turns else ""
    text = edited(before, repl.streams.screen)
    if not text.strip():
        repl.notice("nothing was sent")
    elif not turns:
        repl.answer(repl.session.prepare(text))
    elif text == before:
        repl.notice("the message is as it was; /regen asks for another reply")
    else:
        repl.answer(repl.session.prepare_again(text))


def go_on(repl: "Repl", argument: str) -> None:
    repl.answer(repl.session.prepare_continuation())


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
