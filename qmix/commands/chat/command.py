"""`qmix chat`: a conversation on a terminal, one message from the command line or a pipe, or lines.

Heavy imports stay inside the functions.
"""

import io
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import CTRL_C, CUT_REPLY, UsageError
from qmix.formats.metadata import read_metadata
from qmix.formats.mistral.detect import refuse_raw
from qmix.gguf.files import checked_source

# What neither the command line nor the checkpoint's generation_config.json says.
_DEFAULTS: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 0,
    "min_p": 0.05,
    "max_new_tokens": 1024,
}
LEAST_CONTEXT = 16
_STDIN_CHARACTERS = 4 << 20  # more than any context holds

Text = Annotated[
    str | None,
    typer.Argument(
        metavar="[TEXT]", help="One message: print the reply and leave.", show_default=False
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        parser=options.token_count, help="Context in tokens: 8k.", show_default="the model's"
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


@options.grouped
def chat(
    directory: options.Directory,
    text: Text = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    template: options.Template = None,
    ctx: Context = None,
    max_new_tokens: LongestReply = None,
    sampling: options.Sampling = options.SAMPLING,
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
    """
    given = sampling.parse(max_new_tokens)
    interactive = sys.stdin.isatty() and text is None
    _check(text, lines=lines, as_json=as_json, interactive=interactive)
    directory = sources.local(directory, yes=yes)
    _check_context(ctx, directory)
    message = None if interactive or lines else _message(text)
    if sys.stdin.isatty():
        terminal.enable_ctrl_c()
    if quiet:
        logging.getLogger("qmix").setLevel(logging.WARNING)
    from qmix import GenerationConfig
    from qmix.commands.chat.loading import ChatLoader
    from qmix.commands.repl import Repl, Streams

    defaults = GenerationConfig(**_DEFAULTS).attributed("qmix")
    loader = ChatLoader(load, ctx, template, defaults, quiet)
    typed = sys.stdin if message is None else io.StringIO()  # one message is no conversation
    streams = Streams(typed, sys.stdout, terminal.console(), plain, as_json, quiet)
    repl = Repl.loaded(loader, directory, given, streams, system)
    repl.greet()
    try:
        if message is None:
            repl.run()
        else:
            repl.ask(message)
    except KeyboardInterrupt:
        if as_json and repl.session.replies:  # the document says so; there is no second one
            sys.exit(CTRL_C)
        raise
    if repl.has_cut_replies and not interactive:
        raise typer.Exit(CUT_REPLY)


def _check(text: str | None, *, lines: bool, as_json: bool, interactive: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: two do.
    """
    if lines and text is not None:
        raise UsageError("--lines takes its messages from stdin alone", found="TEXT")
    if as_json and interactive:
        raise UsageError("--json needs TEXT, or a pipe", found="a terminal")


def _check_context(ctx: int | None, directory: Path) -> None:
    """Refuse a checkpoint that is none, and a context that it does not have, before it is loaded.

    Raises:
        CheckpointError: it is damaged, or not there.
        UsageError: the context is too small, or larger than the model's.
    """
    refuse_raw(checked_source(directory))
    limit = read_metadata(directory).config.max_position_embeddings
    if ctx is not None and not LEAST_CONTEXT <= ctx <= limit:
        expected = f"{LEAST_CONTEXT} to {limit}"
        raise UsageError("out of range", where="--ctx", expected=expected, found=ctx)


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
