"""The command line: dispatches to qmix.commands and turns errors into exit codes.

stdout carries data, stderr the interface. Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input or
checkpoint, 4 resources, 5 quality gate failed, 6 a reply was cut short, 75 interrupted but
resumable, 130 Ctrl-C. Heavy imports stay inside the commands: help and usage errors need no torch.
"""

import itertools
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from qmix import __version__
from qmix.commands import (
    batch,
    bench,
    compare,
    doctor,
    evaluate,
    files,
    generate,
    help_page,
    hub,
    json_log,
    plan,
    quantize,
    serve,
    terminal,
    trace,
    tune,
)
from qmix.commands.chat import command
from qmix.errors import CTRL_C, QmixError, ResourceError, of_device
from qmix.files.file_errors import FULL

app = help_page.HelpedApp(
    help="Mixtral-8x7B in 4 bits on one GPU: quantize, chat, evaluate.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input, 4 resources, 5 quality gate, "
    "6 a cut reply, 75 interrupted but resumable, 130 Ctrl-C.",
    pretty_exceptions_enable=False,
)

_RUN, _MEASURE, _LOOK = "Make and run a model", "Measure", "Models and this machine"

app.command("quantize", rich_help_panel=_RUN)(quantize.quantize)
app.command("chat", rich_help_panel=_RUN)(command.chat)
app.command("generate", rich_help_panel=_RUN)(generate.generate)
app.command("serve", rich_help_panel=_RUN)(serve.serve)
app.command("batch", rich_help_panel=_RUN)(batch.batch)
app.command("convert", rich_help_panel=_RUN)(files.convert)
app.command("export", rich_help_panel=_RUN)(files.export)
app.command("eval", rich_help_panel=_MEASURE)(evaluate.evaluate)
app.command("compare", rich_help_panel=_MEASURE)(compare.compare)
app.command("bench", rich_help_panel=_MEASURE)(bench.bench)
app.add_typer(trace.app, name="trace", rich_help_panel=_MEASURE)
app.command("demo", rich_help_panel=_MEASURE)(bench.demo)
app.command("plan", rich_help_panel=_LOOK)(plan.plan)
app.command("inspect", rich_help_panel=_LOOK)(files.inspect)
app.command("verify", rich_help_panel=_LOOK)(files.verify)
app.command("pull", rich_help_panel=_LOOK)(hub.pull)
app.command("list", rich_help_panel=_LOOK)(hub.list_models)
app.command("rm", rich_help_panel=_LOOK)(hub.remove)
app.command("doctor", rich_help_panel=_LOOK)(doctor.doctor)
app.command("tune", rich_help_panel=_LOOK)(tune.tune)

_START = """\
qmix: Mixtral-8x7B in 4 bits on one GPU

Start here, with a model of the hub such as mistralai/Mixtral-8x7B-Instruct-v0.1:
  qmix doctor                 what this machine has, and what it lacks
  qmix plan ORG/NAME          what fits it, and how fast, before a download
  qmix quantize ORG/NAME OUT  make a 4-bit checkpoint
  qmix chat OUT               talk to it

qmix --help lists all commands, and qmix chat --help explains one.
"""


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("-V", "--version", help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (QMIX_DEBUG=1).")] = False,
) -> None:
    """What stands before a command's name, or alone."""
    if debug:
        os.environ["QMIX_DEBUG"] = "1"
    if version:
        _print_version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        terminal.write(_START)


@app.command("version", hidden=True)
def version() -> None:
    """Print the version, as many programs do under this name."""
    _print_version()


@app.command("help", hidden=True)
def explain(
    names: Annotated[list[str] | None, typer.Argument(help="A command, or nothing.")] = None,
) -> None:
    """Print the help, as many programs do under this name."""
    app([*(names or ()), "--help"], standalone_mode=False, prog_name="qmix")


def _print_version() -> None:
    terminal.write(f"qmix {__version__}\n")


def main() -> NoReturn:
    """Entry point of the `qmix` command."""
    _make_streams_safe()
    warnings.formatwarning = terminal.format_warning
    terminal.show_logged()
    try:
        # typer's own way would print its errors unescaped
        code = app(standalone_mode=False, prog_name="qmix")
        terminal.flush()
    except Exception as error:  # noqa: BLE001 - the last line of defence of a command
        _fail(error)
    if code == CTRL_C and _as_json():
        terminal.print_error_as_json(QmixError("interrupted"), CTRL_C)
    sys.exit(code if isinstance(code, int) else 0)


def _make_streams_safe() -> None:
    """Survive closed streams, and a locale that cannot encode a reply."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # a file opened later must not get its descriptor
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Arguments are UTF-8 whatever the locale; broken bytes become U+FFFD.
    sys.argv = [os.fsencode(argument).decode("utf-8", "replace") for argument in sys.argv]


def _fail(error: Exception) -> NoReturn:
    """One line on stderr, or JSON on stdout, and the exit code; with --debug the traceback."""
    as_json = _as_json()
    if hasattr(error, "format_message"):  # typer's; where the class lies depends on the version
        if as_json:
            terminal.print_error_as_json(error, 2)
            sys.exit(2)
        sys.exit(terminal.print_usage_error(error))
    try:
        terminal.write("")
    except ResourceError as full:  # stdout is what failed, and the error came of that
        error, as_json = full, False
    if isinstance(error, RuntimeError):
        error = of_device(error) or error
    debug = bool(os.environ.get("QMIX_DEBUG"))
    if as_json:
        terminal.print_error_as_json(error, _exit_code(error))
    if json_log.is_on():
        json_log.failed(error, _exit_code(error))
    elif debug or not as_json:
        terminal.print_error(error, with_traceback=debug)
    sys.exit(_exit_code(error))


def _as_json() -> bool:
    """Whether the command line asks for JSON, also where it is wrong and was not parsed."""
    return "--json" in itertools.takewhile(lambda argument: argument != "--", sys.argv[1:])


def _exit_code(error: Exception) -> int:
    if isinstance(error, QmixError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return 4 if error.errno in FULL else 3
    if isinstance(error.__cause__, KeyboardInterrupt):  # an older typer's Abort
        return CTRL_C
    named = type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
    return 4 if named or isinstance(error, MemoryError) else 1


if __name__ == "__main__":
    main()
