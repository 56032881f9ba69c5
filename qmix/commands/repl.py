"""The chat in a terminal or a pipe: reads messages, carries out /commands, streams replies.

stdout carries the model's text and nothing else; prompts, notices and statistics go to stderr.
Model text is written without control characters and never parsed as markup, so that it cannot
drive the terminal. Knows no option of the command line.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TextIO

from rich.console import Console

from qmix.commands import terminal
from qmix.commands.chat import commands, settings
from qmix.commands.chat.attached_file import AttachedFile
from qmix.commands.chat.background_load import BackgroundLoad
from qmix.commands.chat.chat_model import ServerError
from qmix.commands.chat.file_commands import known_models
from qmix.commands.chat.reply_stats import ReplyStats
from qmix.commands.chat.start_line import start_line
from qmix.commands.line_editing.choice import line_reader
from qmix.commands.line_editing.reader import FENCE, LineReader, PlainLines, unfenced
from qmix.commands.load_bar import Progress, load_bar
from qmix.commands.reply_writer import ReplyWriter, reply_writer
from qmix.commands.session import PreparedPrompt, Session
from qmix.errors import QmixError, UsageError
from qmix.generation.config import GenerationConfig
from qmix.quantities import counted

if TYPE_CHECKING:  # a chat with a server needs no torch
    from qmix.commands.chat.loading import ChatLoader

PROMPT = ">>> "
_LOOK_EVERY_S = 0.1  # at a model that is being loaded


@dataclass(frozen=True)
class Streams:
    """Where lines come from and where text and notices go.

    Attributes:
        plain: replies are written as they are, also on a terminal.
        as_json: a reply is a document with its numbers, in one line.
        quiet: nothing is said that was not asked for.
    """

    lines: TextIO
    text: TextIO
    notices: Console
    plain: bool = False
    as_json: bool = False
    quiet: bool = False

    @property
    def interactive(self) -> bool:
        return self.lines.isatty()

    @property
    def screen(self) -> IO[str] | None:
        """A stream that is a terminal."""
        return next((each for each in (self.text, self.notices.file) if each.isatty()), None)


def _reader(streams: Streams) -> LineReader:
    """What reads the messages, and completes commands."""
    return line_reader(
        streams.lines,
        streams.text,
        streams.notices,
        commands=commands.COMMANDS,
        settings=settings.EXAMPLES,
        models=known_models,
    )


def _silent(what: str, done: float, total: float) -> None:
    """Show nothing."""


class Discard:
    """A ReplyWriter for a reply that is not shown as it comes."""

    def write(self, piece: str) -> None:
        """Leave it to others."""

    def close(self) -> None:
        """There is nothing to end."""


class NotLoaded(Exception):  # noqa: N818  it holds the error
    """The chat's first model could not be loaded."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class ReplyFailedError(Exception):
    """A reply ended with an error, which its document has told."""

    def __init__(self, error: QmixError) -> None:
        self.error = error


class Repl:
    """One conversation: at a prompt, line by line from a pipe, or a single message.

    Args:
        session: with its model, or while that is being loaded.

    Attributes:
        loader: loads another model; None where there is none to load.
        directory: where the session's model came from, if a loader loaded it.
        attached: files that go along with the next message.
        has_cut_replies: whether the model would have gone on with any reply.
    """

    def __init__(
        self,
        session: Session | BackgroundLoad[Session],
        streams: Streams,
        loader: "ChatLoader | None" = None,
        directory: Path | None = None,
        reader: LineReader | None = None,
    ) -> None:
        self._session = session
        self.streams = streams
        self.loader, self.directory = loader, directory
        self.attached: list[AttachedFile] = []
        self.has_cut_replies = False
        self.reader = _reader(streams) if reader is None else reader

    @classmethod
    def loaded(
        cls,
        loader: "ChatLoader",
        directory: Path,
        given: GenerationConfig,
        streams: Streams,
        system: str | None = None,
    ) -> "Repl":
        """A conversation with a model that is loaded now, or while the first message is edited.

        Args:
            given: what the user has said of the sampling.

        Raises:
            QmixError: the model cannot be loaded.
        """

        def load(progress: Progress | None) -> Session:
            return Session(*loader.load(directory, given, progress), system=system)

        reader = _reader(streams)
        if isinstance(reader, PlainLines):  # it cannot draw below a line that is being typed
            with reader.held(), load_bar(quiet=streams.quiet) as show:
                return cls(load(show), streams, loader, directory, reader)
        return cls(BackgroundLoad(load, quiet=streams.quiet), streams, loader, directory, reader)

    @property
    def session(self) -> Session:
        """The conversation. A model that is still being loaded is waited for, and introduced.

        Raises:
            NotLoaded: it cannot be loaded.
        """
        if isinstance(self._session, BackgroundLoad):
            self._session = self._awaited(self._session)
            self.greet()
        return self._session

    def _awaited(self, load: BackgroundLoad[Session]) -> Session:
        if not load.wait(0):
            drawn = nullcontext(_silent) if self.streams.quiet else terminal.progress(load.begun)
            with self.reader.held(), drawn as show:
                while not load.wait(_LOOK_EVERY_S):
                    show(*load.status())
        try:
            return load.result()
        except Exception as error:  # noqa: BLE001  of whatever kind, it ends the chat
            raise NotLoaded(error) from None

    def close(self) -> None:
        """Give up a model that is being loaded, or keep what was computed if somebody wants it."""
        if isinstance(self._session, BackgroundLoad):
            self._session.cancel()
        else:
            self._session.keep_cache()

    @property
    def start_line(self) -> str:
        """What the model is, and how it is sampled."""
        return start_line(self.session.model, self.session.config, self.streams.notices.width)

    def greet(self) -> None:
        """Say what the model is; without a terminal, what makes its prompts if that is its own.

        Of a model that is being loaded this is said once it is there.
        """
        if isinstance(self._session, BackgroundLoad):
            return
        template = self.session.model.template
        if self.streams.interactive:
            self.remark(self.start_line)
        elif template is not None:
            self.remark(f"template: {template}")

    def switch(self, loader: "ChatLoader", directory: Path, given: GenerationConfig) -> None:
        """Go on with another model, and no turns; its context may be smaller.

        Raises:
            QmixError: it cannot be loaded.
        """
        system = self.session.system
        with load_bar(quiet=self.streams.quiet) as show:
            self._session = Session(*loader.load(directory, given, show), system=system)
        self.directory = directory

    def run(self) -> None:
        """Read and answer messages until the end of the input or /exit.

        Raises:
            KeyboardInterrupt: Ctrl-C while the input is a pipe.
            UsageError: a message of a pipe does not fit.
            ServerError: the model of a pipe is gone.
            NotLoaded: the model cannot be loaded.
        """
        if self.streams.interactive:
            self.remark("Type a message, /help for commands, Ctrl-D to leave.")
        else:
            terminal.decode_utf8(self.streams.lines)
        while True:
            try:
                self._take(self._read())
            except EOFError:
                return
            except (UsageError, ServerError) as error:
                if not self.streams.interactive:
                    raise
                self.notice(f"{error}")
            except KeyboardInterrupt:
                if not self.streams.interactive:
                    raise
                self.notice("\nCtrl-D or /exit leaves; Ctrl-C stops a reply.")

    def ask(self, message: str) -> None:
        """Answer a message as it is, whatever it begins with.

        Raises:
            UsageError: it does not fit the context.
            ServerError: the model is gone.
        """
        self.answer(self.session.prepare("\n".join([*self._blocks(), message])))
        self.attached.clear()

    def answer(self, prompt: PreparedPrompt) -> None:
        """Write the reply to a prompt, and what is to be said of it.

        Raises:
            KeyboardInterrupt: Ctrl-C while the input is a pipe.
            ServerError: the model is gone; what came of the reply stays.
            ReplyFailedError: the same, where a document has told what came.
        """
        if prompt.dropped_tokens:
            self.remark(_dropped(prompt, self.session.context or 0))
        text, end = self._written(self.session.reply(prompt))
        stats = self.session.stats
        assert stats is not None
        self.has_cut_replies |= stats.cut
        if isinstance(end, QmixError):
            if not (self.streams.as_json and text):
                raise end
            self._print_document(text, stats, **end.to_dict())
            raise ReplyFailedError(end)
        self._report(text, stats)
        if end is not None and not self.streams.interactive:
            raise end

    def notice(self, text: str) -> None:
        """Say what somebody asked for."""
        terminal.show_lines(text, self.streams.notices, style="dim")

    def remark(self, text: str) -> None:
        """Say what nobody asked for."""
        if not self.streams.quiet:
            self.notice(text)

    def _read(self) -> str:
        """The next message or command; the first one is edited while the model is loaded."""
        if isinstance(self._session, BackgroundLoad):
            line = self.reader.read_during(PROMPT, self._session)
            if line is not None:
                return line
            assert self.session  # it is there, and said to be
        return self.reader.read(PROMPT)

    def _take(self, line: str) -> None:
        """Carry out a command, or answer a message; what comes from a pipe is no command."""
        if not self.streams.interactive:
            pass
        elif line.startswith(FENCE):
            line = unfenced(line)
        elif line.startswith("/"):
            found = commands.found(line)
            if found is not None:
                self._run(*found)
                return
            if not commands.is_message(line):
                self.notice(commands.suggestion(line))
                return
        if line.strip():
            self.ask(line)

    def _run(self, command: commands.ChatCommand, argument: str) -> None:
        """Carry out a command; what is wrong with it is said."""
        try:
            command.run(self, argument)
        except QmixError as error:
            self.notice(f"{error}")

    def _blocks(self) -> Iterator[str]:
        return (file.block for file in self.attached)

    def _written(self, pieces: Iterator[str]) -> tuple[str, KeyboardInterrupt | QmixError | None]:
        """Write a reply as it comes; its text, and what ended it, if it was not its own end."""
        writer: ReplyWriter = Discard()
        if not self.streams.as_json:
            writer = reply_writer(self.streams.text, plain=self.streams.plain)
        written: list[str] = []
        end: KeyboardInterrupt | QmixError | None = None
        with self.reader.held():
            try:
                for piece in pieces:
                    writer.write(piece)
                    written.append(piece)
            except (KeyboardInterrupt, QmixError) as raised:
                end = raised
            finally:
                pieces.close()  # type: ignore[attr-defined]
                writer.close()
        return "".join(written), end

    def _report(self, text: str, stats: ReplyStats) -> None:
        if self.streams.as_json:
            self._print_document(text, stats)
        elif not stats.new_tokens:
            self.remark("stopped before the first token; the conversation is as it was")
        elif self.streams.interactive and not self.streams.quiet:
            terminal.show_status(stats.line(hint="/continue goes on"), self.streams.notices)
        elif stats.finish != "stop":
            self.remark(str(stats))

    def _print_document(self, text: str, stats: ReplyStats, **more: object) -> None:
        name = self.session.model.identity.name
        terminal.print_json({"model": name, "text": text, **stats.to_dict(), **more})


def _dropped(prompt: PreparedPrompt, context: int) -> str:
    """What the context had no room for."""
    parts = []
    if prompt.dropped_turns:
        oldest = (
            "oldest turn" if prompt.dropped_turns == 1 else f"{prompt.dropped_turns} oldest turns"
        )
        parts.append(f"the {oldest}")
    if prompt.turn.hidden:
        parts.append("the beginning of the reply")
    return (
        f"dropped {' and '.join(parts)} ({counted(prompt.dropped_tokens, 'token')}): "
        f"the context of {context:,} was full"
    )
