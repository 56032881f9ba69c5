"""The command line: called in this process, or as a process or at a terminal of its own.

Most tests of a command need no process, whose start takes two seconds. What a process is, its
signals, streams and exit codes, is tested with one, by `qmix_apart`, `started` and `Terminal`.
"""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import dataclass
from unittest import mock

from rich.console import Console

from qmix.commands.chat.local_model import LocalModel, ModelSource
from qmix.commands.chat.saved_chat import ModelIdentity
from qmix.commands.repl import Repl, Streams
from qmix.commands.session import Session
from qmix.generation.config import GenerationConfig
from qmix.planning.machine import Gpu
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import ROOT, TINY, small_model

QMIX = [sys.executable, "-W", "error", "-m", "qmix"]
PATIENCE = 300  # seconds until a child counts as hanging, on a machine that is busy too


@dataclass(frozen=True)
class Done:
    """What a command left, as subprocess.CompletedProcess says it."""

    returncode: int
    stdout: str
    stderr: str


def qmix(*arguments, stdin=None, cwd=ROOT):
    """Call the command line in this process, 100 columns wide, in the checkout or in `cwd`."""
    from qmix import cli

    with ExitStack() as stack:
        given, out, err = (
            stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", newline=""))
            for _ in range(3)
        )
        given.write(stdin or "")
        given.seek(0)
        argv = ["qmix", *map(str, arguments)]
        streams = {"stdin": given, "stdout": out, "stderr": err}
        stack.enter_context(mock.patch.multiple(sys, argv=argv, **streams))
        stack.enter_context(mock.patch.dict(os.environ, COLUMNS="100"))
        stack.enter_context(chdir(cwd))
        stack.enter_context(mock.patch.object(warnings, "formatwarning", warnings.formatwarning))
        code = _exit_code(cli.main)
        out.seek(0)
        err.seek(0)
        return Done(code, out.read(), err.read())


def _exit_code(main):
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    except Exception:  # noqa: BLE001 - as the interpreter does, with --debug
        traceback.print_exc()
        return 1


def environment_of_child(**changes):
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **changes}


def finished(command, *, stdin=None, stdout=subprocess.PIPE, cwd=ROOT, environment=None):
    """Run a command as a process, to its end."""
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment_of_child(**(environment or {})),
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )


def qmix_apart(*arguments, **options):
    """Run the command line as a process, to its end."""
    return finished([*QMIX, *arguments], **options)


def python(code, *arguments, environment=None):
    """Run code in a fresh interpreter, to its end."""
    return finished([sys.executable, "-c", code, *arguments], environment=environment)


def succeeds(code, *arguments, environment=None):
    """What code printed in a fresh interpreter that must exit 0."""
    done = python(code, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def started(command, **options):
    """A process in a session of its own; at the end nothing of it is left."""
    process = subprocess.Popen(
        command,
        cwd=options.pop("cwd", ROOT),
        env=environment_of_child(**options.pop("environment", {})),
        start_new_session=True,
        **options,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


class Terminal:
    """A command in a pseudo-terminal, started with Ctrl-C ignored, as a background job is."""

    # The new session takes the terminal as its own, so that Ctrl-C reaches it.
    OWN = (
        "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
        "signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, descriptor, process):
        self.descriptor, self.process = descriptor, process
        self.seen = ""
        self.at = 0  # what has been waited for ends here

    @classmethod
    @contextmanager
    def of(cls, *arguments, **environment):
        descriptor, terminal = pty.openpty()
        command = [sys.executable, "-c", cls.OWN, *QMIX, *map(str, arguments)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        try:
            with started(command, environment=environment, **streams) as process:
                os.close(terminal)
                yield cls(descriptor, process)
        finally:
            os.close(descriptor)

    def read(self, seconds):
        """Take what the process writes within the time; whether there was anything."""
        if not select.select([self.descriptor], [], [], seconds)[0]:
            return False
        self.seen += os.read(self.descriptor, 65536).decode("utf-8", "replace")
        return True

    def shows(self, text):
        """Whether `text` stands behind what was waited for before; then it has been waited for."""
        found = self.seen.find(text, self.at)
        if found >= 0:
            self.at = found + len(text)
        return found >= 0

    def until(self, text):
        """Read on until `text` appears."""
        deadline = time.monotonic() + PATIENCE
        while not self.shows(text):
            assert time.monotonic() < deadline, self.seen
            self.read(1)

    def until_prompt(self):
        """Read on until the line editor has opened and drawn its prompt."""
        self.until("\x1b[?2004h")
        self.until(">>>")

    def send(self, text):
        os.write(self.descriptor, text.encode())


GIB = 1 << 30
CARD = Gpu(
    name="NVIDIA GeForce RTX 3090",
    total=24 * GIB,
    free=23 * GIB,
    driver="550.54",
    capability=(8, 6),
)


class Keyboard(io.StringIO):
    """What a person types, line by line."""

    def isatty(self):
        return True


def typed(session, lines):
    """The replies and the notices of lines that are typed at a dumb terminal, without prompts."""
    return _chatted(session, Keyboard(lines))


def piped(session, lines):
    """The replies and the notices of a pipe whose lines are messages."""
    return _chatted(session, io.StringIO(lines))


def _chatted(session, lines):
    text, notices = io.StringIO(), io.StringIO()
    console = Console(file=notices, width=200, color_system=None)
    with mock.patch.dict(os.environ, TERM="dumb"):
        Repl(session, Streams(lines, text, console)).run()
    return text.getvalue(), without_prompts(notices.getvalue())


def without_prompts(notices):
    """What a chat at a dumb terminal says, but for its greeting and its prompts."""
    said = notices.removeprefix("Type a message, /help for commands, Ctrl-D to leave.\n")
    return said.replace(">>> ", "").replace("... ", "")


def session_of(model, tokenizer, config, *, system=None, **options):
    """A conversation with a model; what is told of its files is told of the tiny one's."""
    source = ModelSource(TINY, ModelIdentity("tiny", "0"))
    return Session(LocalModel(source, model, tokenizer, **options), config, system=system)


def small_session(**options):
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    config = GenerationConfig(max_new_tokens=5, eos_token_id=2)
    return session_of(model, tokenizer, config, **options)


def run(lines):
    """The session after these lines, and what `typed` returns."""
    session = small_session()
    return session, *typed(session, lines)
