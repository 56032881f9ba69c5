"""`qmix batch`: a file of prompts, answered line by line, on this machine or by Ray's workers.

Heavy imports stay inside the functions.
"""

import itertools
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmix.commands import json_log, options, sources, terminal
from qmix.commands.generate import NewTokens
from qmix.errors import InterruptedRunError, UsageError
from qmix.quantities import counted

if TYPE_CHECKING:
    from qmix import GenerationConfig
    from qmix.serving.batch.prompt_lines import PromptLine
    from qmix.serving.batch.result_file import ResultFile
    from qmix.serving.batch.worker import WorkerSettings

Workers = Annotated[
    int | None,
    typer.Option(
        min=1, max=4096, metavar="N", help="By N workers of a Ray cluster. Needs the extra ray."
    ),
]


@options.grouped
def batch(
    directory: options.Directory,
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="JSON lines: a prompt or messages each.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="JSON lines: a result each.")],
    max_new_tokens: NewTokens = None,
    template: options.Template = None,
    slots: options.Slots = 8,
    ctx: options.ServedContext = None,
    ray: Workers = None,
    sampling: options.Sampling = options.SAMPLING,
    force: options.Force = False,
    as_json: options.AsJson = False,
    log_json: json_log.LogJson = False,
    quiet: options.Quiet = False,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Answer a file of prompts; OUT gets a line for each, in order.

    A line is {"prompt": TEXT} or {"messages": [...]}, with "id" and "max_new_tokens" if you like.
    The same command goes on after any end, also kill -9: results that are there stay, and each
    line gets exactly one. Greedy unless you or the checkpoint say otherwise. A line that cannot be
    answered gets {"error": ...}.

    Examples:
      qmix batch mixtral-nf4 prompts.jsonl results.jsonl --max-new-tokens 64
      qmix batch mixtral-nf4 prompts.jsonl results.jsonl --ray 4
    """
    config = sampling.parse(max_new_tokens)
    if ray is not None:
        from qmix.serving.ray_cluster import check_extra

        check_extra()
    settings = _settings(
        sources.local(directory, yes=yes), config, template, slots=slots, context=ctx, load=load
    )
    with _open(prompts, out, settings.said, force=force) as (lines, file):
        try:
            _write(lines, file, settings, ray, quiet=quiet or log_json)
        except KeyboardInterrupt:
            raise InterruptedRunError(
                f"interrupted after {counted(file.done, 'result')}",
                where=str(out),
                remedy="The same command goes on.",
            ) from None
    if as_json:
        terminal.print_json({"out": str(out), "results": file.done})
    if json_log.is_on():
        json_log.tell("done", out=str(out), results=file.done)
    elif not as_json and not quiet:
        terminal.message(f"{out}: {counted(file.done, 'result')}")


def _settings(
    source: Path,
    config: "GenerationConfig",
    template: str | None,
    *,
    slots: int,
    context: int | None,
    load: options.Load,
) -> "WorkerSettings":
    """
    Raises:
        QmixError: see sources.checked_context.
    """
    from qmix.models.options import parse_dtype
    from qmix.serving.batch.worker import WorkerSettings

    context = sources.checked_context(source, context, default=options.SERVED_CONTEXT)
    return WorkerSettings(
        source=source.absolute(),
        config=config,
        template=template,
        slots=slots,
        context=context,
        dtype=parse_dtype(load.dtype),
        load=partial(load.parse, context, slots),
    )


@contextmanager
def _open(
    prompts: Path, out: Path, said: str, *, force: bool
) -> "Iterator[tuple[Iterator[PromptLine], ResultFile]]":
    """The lines that are left, and the file that their results go to.

    Raises:
        UsageError: OUT is PROMPTS, holds other results, or is written by another process.
        CheckpointError: PROMPTS cannot be read.
    """
    from qmix.files import regular_file
    from qmix.serving.batch.prompt_lines import prompt_lines
    from qmix.serving.batch.result_file import results

    if out.exists() and prompts.exists() and out.samefile(prompts):
        raise UsageError("OUT is PROMPTS", where=str(out))
    with regular_file.open_regular(prompts) as given, results(out, anew=force) as file:
        lines = prompt_lines(given)

        def key_of(number: int) -> str | None:
            line = next(lines, None)
            return None if line is None else line.key(said)

        file.go_on(key_of)
        yield lines, file


def _write(
    lines: "Iterator[PromptLine]",
    file: "ResultFile",
    settings: "WorkerSettings",
    ray: int | None,
    *,
    quiet: bool,
) -> None:
    """Append the results of all lines that are left; without any, no model is loaded."""
    first = next(lines, None)
    if first is None:
        return
    for result in _results(itertools.chain([first], lines), settings, ray, quiet=quiet):
        file.append(result)
        if json_log.is_on():
            json_log.tell("result", **_told(result))


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """What the log says of a result: no text of a prompt or a reply."""
    named = ("line", "finish", "prompt_tokens", "new_tokens", "error")
    told = {name: result[name] for name in named if name in result}
    return {"request_id": str(result.get("id", result["line"])), **told}


def _results(
    lines: "Iterator[PromptLine]", settings: "WorkerSettings", ray: int | None, *, quiet: bool
) -> Iterator[dict[str, Any]]:
    if ray is not None:
        from qmix.serving.batch.ray_workers import answers_of_workers

        yield from answers_of_workers(lines, settings, ray)
        return
    from qmix.commands.load_bar import load_bar
    from qmix.serving.batch.worker import Worker

    with load_bar(quiet=quiet) as bar:
        worker = Worker(settings, bar)
    with closing(worker):
        yield from worker.answers(lines)
