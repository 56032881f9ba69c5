"""`qmix trace`: record which experts a model uses, draw that, and replay it through a policy.

Knows policies only by name. Heavy imports stay inside the functions.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qmix.commands import options, sources, terminal
from qmix.commands.help_page import HelpedApp
from qmix.errors import UsageError
from qmix.files import regular_file
from qmix.hub.local import shown_name
from qmix.quantities import counted, gigabytes

if TYPE_CHECKING:
    from qmix.evals.routing.replay import Replay
    from qmix.evals.routing.simulation import SimulatedMachine
    from qmix.evals.routing.trace import Trace, TraceHeader

app = HelpedApp(help="Record, draw and replay which experts a model uses.")

Rate = Annotated[float, typer.Option(min=0.001, help="GB/s.")]
Pcie = Annotated[float, typer.Option("--pcie", min=0.001, help="GB/s.")]


@app.callback()
def top(context: typer.Context) -> None:
    """Without a command: the help."""
    if context.invoked_subcommand is None:
        terminal.write(f"{context.get_help()}\n")


@app.command()
@options.grouped
def record(
    directory: options.Directory,
    out: Annotated[Path, typer.Option("--out", metavar="TRACE", help="A new file.")],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Decode greedily after this text, and record that."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text to record instead, token by token.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(parser=options.token_count, help="Tokens to record at most.")
    ] = 1024,
    gates: Annotated[bool, typer.Option("--gates", help="Record the routing weights too.")] = False,
    as_json: options.AsJson = False,
    yes: options.Yes = False,
    load: options.Load = options.LOAD,
) -> None:
    """Write which experts each token goes through.

    Examples:
      qmix trace record mixtral-nf4 --data wiki.test.raw --out wiki.trace
      qmix trace record mixtral-nf4 "def fibonacci(n):" --out code.trace
    """
    if (prompt is None) == (data is None):
        raise UsageError("give either a PROMPT or --data")
    if regular_file.exists(out):
        raise UsageError("the file exists", where=str(out), remedy="Choose another name.")
    import qmix
    from qmix.commands.load_bar import load_bar
    from qmix.evals.quality import texts
    from qmix.evals.routing.record import record_trace

    load_options = load.parse()
    directory = sources.local(directory, yes=yes)
    text = None
    if data is not None:
        read = texts.read_text(data)
        terminal.notice_changes(data, read.changes)
        text = read.content
    with load_bar() as bar:
        model, tokenizer = qmix.load(directory, load_options=load_options, progress=bar)
    with terminal.progress() as show:
        tokens = record_trace(
            model,
            tokenizer,
            out,
            name=shown_name(directory),
            max_new_tokens=max_new_tokens,
            prompt=prompt,
            text=text,
            gates=gates,
            progress=lambda done, total: show("tokens", done, total),
        )
    nbytes = out.stat().st_size
    terminal.notice(f"{out}: {counted(tokens, 'token')}, {gigabytes(nbytes)}")
    if as_json:
        terminal.print_json({"trace": str(out), "tokens": tokens, "bytes": nbytes})


@app.command(name="replay")
def replay_trace(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="Written by qmix trace record.")],
    slots: Annotated[int, typer.Option(min=1, help="Experts that fit on the device.")],
    policy: Annotated[
        Literal["heat", "lru", "lfu", "static"],
        typer.Option(help="How experts are chosen to move in."),
    ] = "heat",
    profile: Annotated[
        Path | None,
        typer.Option(help="A trace whose hottest experts fill the slots at the start."),
    ] = None,
    hbm: Rate = 850.0,
    interconnect: Pcie = 25.0,
    cpu: Rate = 60.0,
    expert_mb: Annotated[
        float | None, typer.Option(min=0.000001, help="MB per expert.", show_default="the trace's")
    ] = None,
    dense_mb: Annotated[
        float | None,
        typer.Option(min=0, help="MB of everything else a token.", show_default="the trace's"),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Simulate a policy on a trace, beside LRU and the optimum.

    Prints hit rate, bytes over PCIe and simulated speed. --hbm, --pcie and --cpu are the bandwidths
    that device memory, PCIe and the host's 4-bit matmuls reach.

    Examples:
      qmix trace replay wiki.trace --slots 148 --policy heat --pcie 25
      qmix trace replay wiki.trace --slots 64 --profile code.trace
    """
    from qmix.evals.routing import replay, trace

    recorded = trace.read_trace(path)
    heat = None if profile is None else replay.learned_heat(_profile(profile, recorded), policy)
    machine = _machine(recorded.header, (hbm, interconnect, cpu), (expert_mb, dense_mb))
    rows = replay.compare_policies(recorded, slots, policy, machine, heat=heat)
    document = {
        "trace": str(path),
        "slots": slots,
        "experts": recorded.header.layers * recorded.header.experts,
        "machine": vars(machine),
        "replays": [row.to_dict() for row in rows],
    }
    terminal.print_result(_table(rows), document, as_json=as_json)


@app.command()
def plot(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="Written by qmix trace record.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="A new .html, .svg or .png.")],
    force: options.Force = False,
) -> None:
    """Draw which experts a trace uses.

    A page (.html) shows use by layer and expert, how many experts cover most uses, and how often
    the next token uses them again; .svg and .png show use only.

    Examples:
      qmix trace plot wiki.trace --out wiki.html
      qmix trace plot wiki.trace --out wiki.png --force
    """
    from qmix.evals.report.trace_page import trace_page, use_picture
    from qmix.evals.routing import trace
    from qmix.files import atomic_file
    from qmix.pages import output_file, page

    output_file.check(out, output_file.ANY, force=force)
    recorded = trace.read_trace(path)
    if out.suffix.lower() == output_file.PAGE:
        atomic_file.write(out, page.html(trace_page(recorded, path.name)))
    else:
        picture = use_picture(recorded)
        output_file.write_picture(out, picture.figure, picture.alt)
    terminal.message(f"the picture: {out}")


_HEADER = (
    *("policy", "misses", "hit rate", "uploads/token"),
    *("MB/token over PCIe", "tok/s simulated"),
)


def _table(rows: tuple["Replay", ...]) -> str:
    """The replays in columns on a terminal, else as a markdown table."""
    from qmix.evals import markdown

    paths = {"read": "read over PCIe", "cpu": "CPU", "copy": "copied first"}
    cells = [
        (
            row.name,
            paths[row.path],
            f"{100 * row.hit_rate:.2f} %",
            f"{row.uploads_per_token:.3f}",
            f"{row.interconnect_bytes_per_token / 1e6:,.2f}",
            f"{row.tokens_per_s:,.1f}",
        )
        for row in rows
    ]
    draw = markdown.aligned if sys.stdout.isatty() else markdown.table
    return draw(_HEADER, cells)


def _profile(path: Path, recorded: "Trace") -> "Trace":
    """Another trace of the same model."""
    from qmix.evals.routing import trace

    profile = trace.read_trace(path)
    shape = (recorded.header.layers, recorded.header.experts)
    if (profile.header.layers, profile.header.experts) != shape:
        raise UsageError(
            "the profile is of another model",
            where=str(path),
            expected=f"{counted(shape[0], 'layer')} of {counted(shape[1], 'expert')}",
            found=f"{profile.header.layers} of {profile.header.experts}",
        )
    return profile


def _machine(
    header: "TraceHeader",
    rates: tuple[float, float, float],
    megabytes: tuple[float | None, float | None],
) -> "SimulatedMachine":
    """Sizes from the options, else from the trace, else Mixtral-8x7B's."""
    from qmix.evals.routing.simulation import SimulatedMachine

    default = SimulatedMachine()
    device, interconnect, cpu = (round(rate * 1e9) for rate in rates)
    expert, dense = (None if size is None else round(size * 1e6) for size in megabytes)
    return replace(
        default,
        device=device,
        interconnect=interconnect,
        cpu=cpu,
        expert_bytes=expert or header.expert_bytes or default.expert_bytes,
        dense_bytes=header.dense_bytes or default.dense_bytes if dense is None else dense,
    )
