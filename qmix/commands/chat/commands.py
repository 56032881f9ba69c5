"""The table of the chat's commands: what each is called, what it takes, what it does.

Help, completion and dispatch read it; nothing else lists commands.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qmix.commands.chat import conversation_commands as conversation
from qmix.commands.chat import file_commands as files
from qmix.commands.chat import insight_commands as insight
from qmix.commands.line_editing.command import Argument, Command

if TYPE_CHECKING:
    from qmix.commands.repl import Repl


@dataclass(frozen=True, kw_only=True)
class ChatCommand(Command):
    """A command of the chat.

    Attributes:
        run: carries it out with what stands behind its name; raises UsageError where that is
            wrong, and EOFError to leave the chat.
        usage: what may stand behind the name.
        aliases: other names, with their slash.
        listed: whether the help names it.
    """

    run: Callable[["Repl", str], None]
    usage: str = ""
    aliases: tuple[str, ...] = ()
    listed: bool = True


def _help(repl: "Repl", argument: str) -> None:
    repl.notice(help_text())


def _exit(repl: "Repl", argument: str) -> None:
    raise EOFError


COMMANDS = (
    ChatCommand("/help", Argument.NONE, "this text", run=_help, aliases=("/?",)),
    ChatCommand(
        *("/regen", Argument.TEXT, "another reply to the last message"),
        run=conversation.regenerate,
        usage="[TEMPERATURE]",
    ),
    ChatCommand(
        *("/continue", Argument.NONE, "go on with a reply that was cut short"),
        run=conversation.go_on,
    ),
    ChatCommand(
        "/undo", Argument.NONE, "forget the last message and its reply", run=conversation.undo
    ),
    ChatCommand(
        *("/edit", Argument.NONE, "change the last message in $EDITOR and send it again"),
        run=conversation.edit,
    ),
    ChatCommand(
        *("/file", Argument.PATH, "take a text file along with the next message"),
        run=files.attach,
        usage="PATH [10-40]",
        aliases=("/read",),
    ),
    ChatCommand(
        *("/copy", Argument.TEXT, "copy the last reply, the nth last, or a code block"),
        run=files.copy,
        usage="[code] [n]",
    ),
    ChatCommand(
        *("/save", Argument.PATH, "write the conversation as JSON"), run=files.save, usage="FILE"
    ),
    ChatCommand(
        *("/load", Argument.PATH, "go on with a conversation that was saved"),
        run=files.load,
        usage="FILE",
    ),
    ChatCommand(
        *("/clear", Argument.NONE, "forget the conversation, keep the system prompt"),
        run=conversation.clear,
    ),
    ChatCommand(
        *("/system", Argument.TEXT, "show, set or remove (-) the system prompt"),
        run=conversation.system,
        usage="[TEXT]",
    ),
    ChatCommand(
        *("/set", Argument.SETTING, "show or change how replies are sampled"),
        run=conversation.set_value,
        usage="[NAME [VALUE]]",
    ),
    ChatCommand(
        *("/model", Argument.MODEL, "show the model, or take another one"),
        run=files.switch,
        usage="[MODEL]",
    ),
    ChatCommand(
        *("/stats", Argument.NONE, "the last reply and the conversation in numbers"),
        run=insight.stats,
    ),
    ChatCommand(
        *("/tokens", Argument.TEXT, "tokens of each turn, or of a text"),
        run=insight.tokens,
        usage="[TEXT]",
    ),
    ChatCommand(
        *("/prompt", Argument.NONE, "what the model was given, text and ids"), run=insight.prompt
    ),
    ChatCommand(
        *("/probs", Argument.NONE, "what else each token of the reply could have been"),
        run=insight.probabilities,
    ),
    ChatCommand(
        *("/experts", Argument.NONE, "which experts wrote the last reply"), run=insight.experts
    ),
    ChatCommand(
        *("/exit", Argument.NONE, "leave (Ctrl-D too)"), run=_exit, aliases=("/quit", "/bye")
    ),
    ChatCommand("/image", Argument.NONE, "refused", run=files.image, listed=False),
)


def help_text() -> str:
    """A line for each command, and how messages are written: a screen of 24 lines of 80 columns."""
    listed = [command for command in COMMANDS if command.listed]
    heads = [f"{command.name} {command.usage}".rstrip() for command in listed]
    width = max(map(len, heads))
    lines = [f"{head:{width}}  {each.help}" for head, each in zip(heads, listed, strict=True)]
    return "\n".join(
        [
            *lines,
            "Ctrl-C stops a reply and keeps it. Alt-Enter or a trailing \\ begins a new line.",
            'Text between """ and """ is one message; so is a line that begins with a space.',
        ]
    )


def found(line: str) -> tuple[ChatCommand, str] | None:
    """The command that a line gives, with what stands behind its name; None for a message.

    Several lines are a command only where it takes a text.
    """
    name, _, argument = line.partition(" ")
    for command in COMMANDS:
        if name in (command.name, *command.aliases):
            if "\n" in line and command.argument is not Argument.TEXT:
                return None
            return command, argument.strip()
    return None


def is_message(line: str) -> bool:
    """Whether a line that begins with a slash, and is no command, is meant for the model.

    It is if its first word is a path that exists, or looks like one, or if more lines follow.
    """
    word = line.split(maxsplit=1)[0].rstrip(".,:;?!)\"'")
    if "\n" in line or (word.count("/") > 1 and any(map(str.isalnum, word))):
        return True
    return any(map(str.isalnum, word)) and os.path.lexists(word)


def suggestion(line: str) -> str:
    """What to say to a line that begins with a slash and is neither a command nor a message."""
    name = line.split(maxsplit=1)[0]
    names = [each for command in COMMANDS for each in (command.name, *command.aliases)]
    close = difflib.get_close_matches(name, names, 1)
    meant = f"did you mean {close[0]}?" if close else "/help lists the commands;"
    return f"no command {name}; {meant} a leading space sends it as text"
