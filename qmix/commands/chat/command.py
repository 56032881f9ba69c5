"""`qmix chat`: a conversation on a terminal, one message from the command line or a pipe, or lines.

Heavy imports stay inside the functions.
"""

import io
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmix.commands import options, sources, terminal
from qmix.commands.api_key import read_key
from qmix.commands.line_editing.held_input import held_input
from qmix.errors import CTRL_C, CUT_REPLY, UsageError

if TYPE_CHECKING:
    from qmix import GenerationConfig
    from qmix.commands.chat.loading import ChatLoader
    from qmix.commands.repl import Repl
    from qmix.commands.session import Session

# What neither the command line nor the checkpoint's generation_config.json says.
_DEFAULTS: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 0,
    "min_p": 0.05,
    "max_new_tokens": 1024,
}
_STDIN_CHARACTERS = 4 << 20  # more than any context holds

_SERVER = "Server"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        path_type=str,  # as it is written: with --connect it is the message
        help="Folder, GGUF file, or ORG/NAME of the hub; none with --connect.",
        show_default=False,
    ),
]
Text = Annotated[
    str | None,
    typer.Argument(
        metavar="TEXT", help="One message: print the reply and leave.", show_default=False
    ),
]
LongestReply = Annotated[
    int | None,
    typer.Option(
        parser=options.token_count,
        help="Longest reply, in tokens.",
        show_default="the checkpoint's, or 1024",
    ),
]
Lines = Annotated[bool, typer.Option("--lines", help="Each line of stdin is a message.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print a JSON document for each reply, in one line.")
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Write replies as they are; do not draw Markdown.")
]


Connect = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Talk to a server of OpenAI's API, and load no model.",
        show_default=False,
    ),
]
Served = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="Which of the server's models.",
        show_default="the only one",
        rich_help_panel=_SERVER,
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the server's key.", show_default="QMIX_API_KEY", rich_help_panel=_SERVER
    ),
]


@options.grouped
def chat(
    model: Model = None,
    text: Text = None,
    connect: Connect = None,
    served: Served = None,
    api_key_file: KeyFile = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    template: options.Template = None,
    ctx: options.Context = None,
    max_new_tokens: LongestReply = None,
    sampling: options.Sampling = options.SAMPLING,
    reuse: options.Reuse = options.REUSE,
    lines: Lines = False,
    plain: Plain = False,
    as_json: AsJson = False,
    quiet: options.Quiet = False,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Talk to a model, or ask it once.

    A pipe is one message, behind TEXT if there is one. Exit 6 if a reply was cut short. What you
    do not give is taken from the checkpoint's generation_config.json, and else from temperature
    0.7 and min-p 0.05; /set shows which.

    Examples:
      qmix chat mixtral-nf4
      git diff | qmix chat mixtral-nf4 "review this"
      qmix chat --connect http://127.0.0.1:8000
    """
    given = sampling.parse(max_new_tokens)
    if connect is not None:
        _check_remote(text, template, ctx, reuse, load)
        text = model
    interactive = sys.stdin.isatty() and text is None
    _check(text, lines=lines, as_json=as_json, interactive=interactive)
    directory = None if connect is not None else _local(model, ctx, yes=yes)
    message = None if interactive or lines else _message(text)
    if sys.stdin.isatty():
        terminal.enable_ctrl_c()
    if quiet:
        logging.getLogger("qmix").setLevel(logging.WARNING)
    with ExitStack() as stack:
        with held_input(sys.stdin, raw=False):  # what is typed is shown once, behind the prompt
            from qmix.commands.repl import Repl, Streams

            typed = sys.stdin if message is None else io.StringIO()  # nothing more than it
            streams = Streams(typed, sys.stdout, terminal.console(), plain, as_json, quiet)
            if directory is None:
                assert connect is not None
                remote = _connected(connect, served, read_key(api_key_file), given)
                repl = Repl(stack.enter_context(remote), streams)
                repl.session.system = system
            else:
                loader = _loader(load, ctx, template, reuse)
                repl = Repl.loaded(loader, directory, given, streams, system)
        _talk(repl, message)
    if repl.has_cut_replies and not interactive:
        raise typer.Exit(CUT_REPLY)


def _talk(repl: "Repl", message: str | None) -> None:
    """Answer one message, or all that is typed or piped."""
    from qmix.commands.repl import NotLoaded, ReplyFailedError

    repl.greet()
    try:
        if message is None:
            repl.run()
        else:
            repl.ask(message)
    except NotLoaded as failure:
        raise failure.error from None
    except ReplyFailedError as failure:  # the document says so
        sys.exit(failure.error.exit_code)
    except KeyboardInterrupt:
        if repl.streams.as_json and repl.session.replies:  # the document says so
            sys.exit(CTRL_C)
        raise
    finally:
        repl.close()


def _check_remote(
    text: str | None,
    template: str | None,
    ctx: int | None,
    reuse: options.Reuse,
    load: options.Load,
) -> None:
    """Refuse what says how a model is loaded, where none is.

    Raises:
        UsageError: such an option was given, or MODEL beside --connect.
    """
    if text is not None:
        raise UsageError("--connect takes the place of MODEL", found="MODEL and TEXT")
    given = {"template": template, "ctx": ctx, **vars(reuse), **vars(load)}
    for name, value in given.items():
        if value is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for a model that is loaded here, not for --connect"
            )


def _local(model: str | None, ctx: int | None, *, yes: bool) -> Path:
    """The checkpoint, on this machine.

    Raises:
        UsageError: there is none; see sources.checked_context.
        QmixError: see sources.local.
    """
    if model is None:
        raise UsageError("nobody to talk to", expected="MODEL or --connect URL", found="neither")
    directory = sources.local(Path(model), yes=yes)
    sources.checked_context(directory, ctx)
    return directory


@contextmanager
def _connected(
    url: str, name: str | None, key: str | None, given: "GenerationConfig"
) -> Iterator["Session"]:
    """A conversation with a server's model, as long as the context is open.

    Raises:
        QmixError: see Server and RemoteModel.
    """
    from qmix.commands.chat import remote_model
    from qmix.commands.chat.server import Server
    from qmix.commands.session import Session

    with Server(url, key) as server:
        yield Session(remote_model.RemoteModel(server, name), remote_model.filled(given))


def _loader(
    load: options.Load,
    ctx: int | None,
    template: str | None,
    reuse: options.Reuse,
) -> "ChatLoader":
    from qmix import GenerationConfig
    from qmix.commands.chat.loading import ChatLoader

    defaults = GenerationConfig(**_DEFAULTS).attributed("qmix")
    return ChatLoader(load, ctx, template, defaults, reuse)


def _check(text: str | None, *, lines: bool, as_json: bool, interactive: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: two do.
    """
    if lines and text is not None:
        raise UsageError("--lines takes its messages from stdin alone", found="TEXT")
    if as_json and interactive:
        raise UsageError("--json needs TEXT, or a pipe", found="a terminal")


def _message(text: str | None) -> str:
    """What is asked: the text, and what stdin holds if it is no terminal.

    Raises:
        UsageError: there is nothing, or far too much.
    """
    piped = ""
    if not sys.stdin.isatty():
        terminal.decode_utf8(sys.stdin)
        piped = sys.stdin.read(_STDIN_CHARACTERS + 1)
    if len(piped) > _STDIN_CHARACTERS:
        raise UsageError(
            "too much for a message",
            where="stdin",
            expected=f"at most {_STDIN_CHARACTERS:,} characters",
            remedy="--lines takes each line as a message.",
        )
    message = "\n\n".join(part for part in (text, piped.strip("\r\n")) if part)
    if not message.strip():
        raise UsageError("there is no message", where="stdin", found="nothing")
    return message
