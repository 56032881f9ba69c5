"""The command line: dispatches to qmix.commands and turns errors into exit codes.

stdout carries data, stderr the interface. Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input or
checkpoint, 4 resources, 5 quality gate failed, 75 interrupted but resumable, 130 Ctrl-C.
Heavy imports stay inside the commands: help and usage errors need no torch.
"""

import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated, NoReturn

import typer

from qmix import __version__
from qmix.commands import (
    doctor,
    evaluate,
    files,
    generate,
    hub,
    plan,
    quantize,
    terminal,
    trace,
    tune,
)
from qmix.errors import QmixError, ResourceError, of_device
from qmix.files.file_errors import FULL

app = typer.Typer(
    help="Mixtral-8x7B in 4 bits on one GPU: quantize, chat, evaluate.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 bad input or checkpoint, 4 resources, "
    "5 quality gate failed, 75 interrupted but resumable, 130 Ctrl-C.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's takes as long to import as all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("quantize")(quantize.quantize)
app.command("convert")(files.convert)
app.command("export")(files.export)
app.command("generate")(generate.generate)
app.command("chat")(generate.chat)
app.command("eval")(evaluate.evaluate)
app.command("bench")(evaluate.bench)
app.command("inspect")(files.inspect)
app.command("verify")(files.verify)
app.command("plan")(plan.plan)
app.command("pull")(hub.pull)
app.command("list")(hub.list_models)
app.command("rm")(hub.remove)
app.command("doctor")(doctor.doctor)
app.command("tune")(tune.tune)
app.command("demo")(evaluate.demo)
app.add_typer(trace.app, name="trace")


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
        terminal.write(f"qmix {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        terminal.print_help(context)


def main() -> NoReturn:
    """Entry point of the `qmix` command."""
    _make_streams_safe()
    warnings.formatwarning = terminal.format_warning
    terminal.show_logged()
    try:
        code = app(standalone_mode=False)  # typer's own way would print its errors unescaped
        terminal.flush()
    except Exception as error:  # noqa: BLE001 - the last line of defence of a command
        _fail(error)
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
    """One line on stderr, and the exit code; the traceback instead with --debug."""
    if hasattr(error, "format_message"):  # typer's; where the class lies depends on the version
        sys.exit(terminal.print_usage_error(error))
    try:
        terminal.flush()
    except ResourceError as full:  # stdout is what failed, and the error came of that
        error = full
    if isinstance(error, RuntimeError):
        error = of_device(error) or error
    terminal.print_error(error, with_traceback=bool(os.environ.get("QMIX_DEBUG")))
    sys.exit(_exit_code(error))


def _exit_code(error: Exception) -> int:
    if isinstance(error, QmixError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return 4 if error.errno in FULL else 3
    if isinstance(error.__cause__, KeyboardInterrupt):  # an older typer's Abort
        return 130
    named = type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error)
    return 4 if named or isinstance(error, MemoryError) else 1


if __name__ == "__main__":
    main()
