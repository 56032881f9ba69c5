"""The chat in a terminal or a pipe: reads lines, carries out /commands, streams replies.

stdout carries the model's text and nothing else; prompts, notices and statistics go to stderr.
Model text is written without control characters and never parsed as markup, so that it cannot
drive the terminal. Knows no option of the command line.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console

from qmix.commands import terminal
from qmix.commands.session import Session
from qmix.errors import UsageError
from qmix.files import user_files
from qmix.generation.config import GenerationConfig

PROMPT = ">>> "
CONTINUED = "... "
_FENCE = '"""'

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
_COMMANDS = ("/help", "/clear", "/system", "/set", "/stats", "/exit")


@dataclass(frozen=True)
class Streams:
    """Where lines come from and where text and notices go."""

    lines: TextIO
    text: TextIO
    notices: Console

    @property
    def interactive(self) -> bool:
        return self.lines.isatty()


class Repl:
    """One conversation at a prompt, or line by line from a pipe."""

    def __init__(self, session: Session, streams: Streams) -> None:
        self.session = session
        self.streams = streams

    def run(self) -> None:
        """Read and answer lines until the end of the input or /exit.

        Raises:
            KeyboardInterrupt: Ctrl-C while the input is a pipe.
            UsageError: a message of a pipe does not fit.
        """
        if self.streams.interactive:
            _enable_line_editing()
            self._notice("Type a message, /help for commands, Ctrl-D to leave.")
        leaving = False
        while not leaving:
            try:
                line = self._line(PROMPT)
                if line.startswith(_FENCE):
                    self._say(self._fenced(line))
                elif line.startswith("/"):
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

    def _fenced(self, line: str) -> str:
        """The lines up to the closing fence, or to the end of the input."""
        body = line[len(_FENCE) :]
        lines = [body] if body else []
        try:
            while not (lines and lines[-1].endswith(_FENCE)):
                lines.append(self._line(CONTINUED))
        except EOFError:
            self._notice(f"the message was not closed with {_FENCE}; it was sent as it is")
            lines.append(_FENCE)
        lines[-1] = lines[-1].removesuffix(_FENCE)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str:
        if self.streams.interactive and self.streams.text.isatty():
            return input(prompt)
        if self.streams.interactive:  # input() would write its prompt among the replies
            terminal.show_lines(prompt, self.streams.notices, end="")
        line = self.streams.lines.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")

    def _say(self, line: str) -> None:
        if not line.strip():
            return
        prompt = self.session.prepare(line)
        if prompt.dropped_turns:
            self._notice(
                f"dropped the {prompt.dropped_turns} oldest turns "
                f"({prompt.dropped_tokens} tokens): the context of {self.session.context} was full"
            )
        pieces = self.session.reply(prompt)
        stopped = False
        try:
            for piece in pieces:
                terminal.write(piece, self.streams.text)
        except KeyboardInterrupt:
            stopped = True
            if not self.streams.interactive:
                raise
        finally:
            pieces.close()  # type: ignore[attr-defined]
            terminal.write("\n", self.streams.text)
        stats = self.session.stats
        assert stats is not None
        if stopped and not stats.new_tokens:
            self._notice("stopped before the first token; the message was not kept")
        elif self.streams.interactive:
            self._notice(str(stats))

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


def _enable_line_editing() -> None:
    """Arrow keys, history across sessions and tab completion of commands, where readline exists."""
    try:
        import readline
    except ImportError:
        return
    history = user_files.state_directory() / "chat_history"
    why = user_files.doubt(history) if os.path.lexists(history) else None
    if why is not None:
        terminal.message(f"qmix: the history is not used: {why}")
        return
    try:
        user_files.prepare(history)
        history.touch(mode=0o600)
        readline.read_history_file(history)
    except OSError:
        return  # a read-only home costs the history only
    readline.set_history_length(1000)
    readline.set_completer_delims("")

    def complete(text: str, state: int) -> str | None:
        matches = [name for name in _COMMANDS if name.startswith(text)]
        return matches[state] if text and state < len(matches) else None

    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")

    import atexit

    def save() -> None:
        try:
            readline.write_history_file(history)
        except OSError:
            terminal.message(f"qmix: cannot save the history to {history}")

    atexit.register(save)
