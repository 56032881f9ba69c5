"""The chat in a terminal or a pipe: reads lines, carries out /commands, streams replies.

stdout carries the model's text and nothing else; prompts, notices and statistics go to stderr.
Model text is written without control characters and never parsed as markup, so that it cannot
drive the terminal. Knows no option of the command line.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console

from qmix.commands import terminal
from qmix.commands.line_editing.choice import line_reader
from qmix.commands.line_editing.command import Argument, Command
from qmix.commands.line_editing.reader import FENCE, unfenced
from qmix.commands.reply_writer import reply_writer
from qmix.commands.session import Session
from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig

PROMPT = ">>> "

HELP = """\
/help                this text
/clear               forget the conversation, keep the system prompt
/system [TEXT]       show or set the system prompt; /system - removes it
/set [NAME VALUE]    show or set temperature, top_k, top_p, min_p,
                     repetition_penalty, max_new_tokens, seed; and
                     who gave each: you, the checkpoint or qmix
/stats               the last reply in numbers
/exit                leave (Ctrl-D too)
Ctrl-C stops a reply and keeps it. Text between two lines of \"\"\" is one message.
A line that begins with a space is sent as it is, also if a / follows."""

_SETTINGS: Mapping[str, Callable[[str], int | float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
    "seed": int,
}
COMMANDS = (
    Command("/help", Argument.NONE, "the commands"),
    Command("/clear", Argument.NONE, "forget the conversation, keep the system prompt"),
    Command("/system", Argument.TEXT, "show or set the system prompt"),
    Command("/set", Argument.SETTING, "show or set how replies are sampled"),
    Command("/stats", Argument.NONE, "the last reply in numbers"),
    Command("/exit", Argument.NONE, "leave"),
)


@dataclass(frozen=True)
class Streams:
    """Where lines come from and where text and notices go.

    Attributes:
        plain: replies are written as they are, also on a terminal.
    """

    lines: TextIO
    text: TextIO
    notices: Console
    plain: bool = False

    @property
    def interactive(self) -> bool:
        return self.lines.isatty()


class Repl:
    """One conversation at a prompt, or line by line from a pipe."""

    def __init__(self, session: Session, streams: Streams) -> None:
        self.session = session
        self.streams = streams
        self.reader = line_reader(
            streams.lines,
            streams.text,
            streams.notices,
            commands=COMMANDS,
            settings=dict.fromkeys(_SETTINGS, ()),
        )

    def run(self) -> None:
        """Read and answer lines until the end of the input or /exit.

        Raises:
            KeyboardInterrupt: Ctrl-C while the input is a pipe.
            UsageError: a message of a pipe does not fit.
        """
        if self.streams.interactive:
            self._notice("Type a message, /help for commands, Ctrl-D to leave.")
        leaving = False
        while not leaving:
            try:
                line = self.reader.read(PROMPT)
                if line.startswith(FENCE):
                    self._say(unfenced(line))
                elif line.startswith("/") and "\n" not in line:
                    leaving = self._try_command(line)
                elif line.strip():
                    self._say(line)
            except EOFError:
                leaving = True
            except UsageError as error:
                if not self.streams.interactive:
                    raise
                self._notice(f"{error}")
            except KeyboardInterrupt:
                if not self.streams.interactive:
                    raise
                self._notice("\nCtrl-D or /exit leaves; Ctrl-C stops a reply.")

    def _try_command(self, line: str) -> bool:
        """Carry out a command, or say what is wrong with it; True if it asks to leave."""
        try:
            return self._command(line)
        except UsageError as error:
            self._notice(f"{error}")
            return False

    def _say(self, line: str) -> None:
        if not line.strip():
            return
        prompt = self.session.prepare(line)
        if prompt.dropped_turns:
            self._notice(
                f"dropped the {prompt.dropped_turns} oldest turns "
                f"({prompt.dropped_tokens} tokens): the context of {self.session.context} was full"
            )
        stopped = self._write(self.session.reply(prompt))
        stats = self.session.stats
        assert stats is not None
        if stopped and not stats.new_tokens:
            self._notice("stopped before the first token; the message was not kept")
        elif self.streams.interactive:
            self._notice(str(stats))

    def _write(self, pieces: Iterator[str]) -> bool:
        """Write a reply as it comes; True if Ctrl-C ended it.

        Raises:
            KeyboardInterrupt: Ctrl-C while the input is a pipe.
        """
        writer = reply_writer(self.streams.text, plain=self.streams.plain)
        with self.reader.held():
            try:
                for piece in pieces:
                    writer.write(piece)
            except KeyboardInterrupt:
                if not self.streams.interactive:
                    raise
                return True
            finally:
                pieces.close()  # type: ignore[attr-defined]
                writer.close()
        return False

    def _command(self, line: str) -> bool:
        """Carry out a command; True if it asks to leave."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/exit", "/quit", "/bye"):
            return True
        if name in ("/help", "/?"):
            self._notice(HELP)
        elif name == "/clear":
            self.session.clear()
            self._notice("forgotten")
        elif name == "/stats":
            stats = self.session.stats
            self._notice("no reply yet" if stats is None else str(stats))
        elif name == "/system":
            self._system(argument)
        elif name == "/set":
            self._set(argument)
        else:
            self._notice(
                f"no command {name}; /help lists the commands, a leading space sends it as text"
            )
        return False

    def _system(self, argument: str) -> None:
        if argument:
            self.session.system = None if argument == "-" else argument
        self._notice(f"system: {self.session.system or '(none)'}")

    def _set(self, argument: str) -> None:
        config = self.session.config
        if argument:
            name, _, value = argument.replace("=", " ", 1).partition(" ")
            self.session.config = configured(config, name, value.strip())
        for name in _SETTINGS:
            self._notice(f"{name:20} {_shown(self.session.config, name)}")

    def _notice(self, text: str) -> None:
        terminal.show_lines(text, self.streams.notices, style="dim")


def configured(config: GenerationConfig, name: str, text: str) -> GenerationConfig:
    """The configuration with one setting, given as text; temperature 0 means greedy.

    Raises:
        UsageError: an unknown name, not a number, or out of range.
    """
    if name not in _SETTINGS:
        raise UsageError(f"no setting {name!r}", expected=", ".join(_SETTINGS))
    try:
        value = _SETTINGS[name](text)
    except ValueError:
        raise UsageError("not a number", where=name, found=repr(text)) from None
    if name == "temperature":
        return config.updated({name: value, "do_sample": value != 0}, by="/set")
    return config.updated({name: value}, by="/set")


def _shown(config: GenerationConfig, name: str) -> str:
    """A setting's value, and who gave it."""
    value, by = getattr(config, name), config.given.get(name, "the default")
    if name == "temperature" and not config.do_sample:
        value, by = "0 (greedy)", config.given.get("do_sample", "the default")
    return f"{'(none)' if value is None else value:<12} {by}"
