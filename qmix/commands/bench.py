"""`qmix bench` and `qmix demo`: how fast a checkpoint is, and what the tiny model's 4 bits cost.

What is measured is in qmix.evals; heavy imports stay inside the functions.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qmix.commands import options, quantize, sources, terminal
from qmix.errors import UsageError
from qmix.hub.local import shown_name
from qmix.pages import output_file
from qmix.quantities import counted

_TESTS = ("128", "0", "1")  # defaults of -n, -d and -b

Prompts = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--n-prompt",
        "--prompts",
        help="Prompt lengths.",
        show_default="512; 512 to 4096 with --attention",
    ),
]
NewTokens = Annotated[str, typer.Option("-n", "--n-gen", help="Numbers of new tokens.")]
Depths = Annotated[str, typer.Option("-d", "--n-depth", help="Tokens already in the cache.")]
Batches = Annotated[str, typer.Option("-b", "--batch", help="Rows at once.")]
Repetitions = Annotated[
    int, typer.Option("-r", "--repetitions", min=1, help="Timed runs of each test.")
]
Attention = Annotated[
    bool, typer.Option("--attention", help="Time attention alone, each implementation.")
]
Window = Annotated[
    int, typer.Option(min=1, help="--attention: sliding window to compare with none.")
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="--attention: draw it too: a new .html, .svg or .png."),
]
ReplacePlot = Annotated[bool, typer.Option("--force", help="--plot: replace the file.")]


@options.grouped
def bench(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR", help="Checkpoint directory; --attention needs none.", show_default=False
        ),
    ] = None,
    prompts: Prompts = None,
    new: NewTokens = _TESTS[0],
    depth: Depths = _TESTS[1],
    batch: Batches = _TESTS[2],
    repetitions: Repetitions = 5,
    attention: Attention = False,
    window: Window = 1024,
    plot: Plot = None,
    force: ReplacePlot = False,
    as_json: options.AsJson = False,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Measure tokens a second beside the bound that memory sets.

    The options are llama-bench's; lists are separated by commas.

    Examples:
      qmix bench mixtral-nf4 -p 512 -n 128 -d 0,4096 -b 1,8
      qmix bench --attention -p 512,4096 --plot attention.html
    """
    if attention:
        if (new, depth, batch) != _TESTS:
            raise UsageError("--attention takes no -n, -d or -b")
        if plot is not None:
            output_file.check(plot, output_file.ANY, force=force, where="--plot")
        _bench_attention(directory, prompts, window, repetitions, load, plot, as_json=as_json)
        return
    if plot is not None:
        raise UsageError("--plot needs --attention")
    if directory is None:
        raise UsageError("give a DIR, or --attention")
    from qmix import MixtralForCausalLM
    from qmix.commands.load_bar import load_bar
    from qmix.evals.timing.bench import parse_tests, run_bench

    tests = parse_tests(prompts or "512", new, depth, batch)
    directory = sources.local(directory, yes=yes)
    parsed = load.parse()
    with load_bar() as bar:
        model = MixtralForCausalLM.from_pretrained(directory, load_options=parsed, progress=bar)
    with terminal.progress() as show:
        report = run_bench(
            model, tests, name=shown_name(directory), repetitions=repetitions, progress=show
        )
    text = report.aligned() if sys.stdout.isatty() else report.markdown()
    terminal.print_result(text, report.to_dict(), as_json=as_json)


def _bench_attention(
    directory: Path | None,
    prompts: str | None,
    window: int,
    repetitions: int,
    load: options.Load,
    plot: Path | None,
    *,
    as_json: bool,
) -> None:
    from qmix.evals.timing import attention_plot
    from qmix.evals.timing.attention_bench import AttentionRequest, run_attention_bench

    request = AttentionRequest.from_options(directory, prompts, window, load.dtype, load.device)
    with terminal.progress() as show:
        report = run_attention_bench(request, repetitions=repetitions, progress=show)
    text = report.aligned() if sys.stdout.isatty() else report.markdown()
    terminal.print_result(text, report.to_dict(), as_json=as_json)
    if plot is not None:
        attention_plot.write(report, plot)
        terminal.message(f"the picture: {plot}")


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Keep the 4-bit checkpoint here.", show_default="a temporary directory"),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Quantize, evaluate and sample the tiny Mixtral of a checkout.

    Examples:
      qmix demo
      qmix demo --out tiny-nf4
    """
    from qmix.evals.quality import demo
    from qmix.evals.quality.measure import compare_nf4
    from qmix.evals.training import tiny_model

    tiny = tiny_model.directory()
    with demo.place(out) as target:
        terminal.message(f"1. quantize {tiny} to 4 bits, and score both on held-out text")
        with terminal.progress() as show:
            comparison = compare_nf4(target, progress=show)
        quantize.draw_report(comparison.report, target)
        terminal.message("2. what the 4 bits cost, on text the model never saw:")
        header, *rows = comparison.rows()
        terminal.table(header, rows)
        scored = counted(comparison.result.tokens, "token")
        terminal.message(f"   {scored}; {comparison.result.protocol}")
        terminal.message("3. the 4-bit model writes (it is tiny: expect grammar, not sense):")
        pieces = []
        for piece in demo.sample(target):
            pieces.append(piece)
            if not as_json:
                terminal.write(piece)
    if as_json:
        terminal.print_json({**comparison.to_dict(), "sample": "".join(pieces)})
    else:
        terminal.write("\n")
    argument = out if out is not None else "OUT, after: qmix quantize evals/tiny OUT"
    terminal.message(f"Next: qmix chat {argument}")
