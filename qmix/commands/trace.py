"""`qmix trace`: records which experts a model uses, and replays that through a policy.

Parses and draws. Knows no policy by more than its name. Heavy imports stay inside the commands.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qmix.commands import terminal
from qmix.errors import UsageError

if TYPE_CHECKING:
    from qmix.evals.routing.replay import Replay
    from qmix.evals.routing.simulation import Machine
    from qmix.evals.routing.trace import Header, Trace

app = typer.Typer(help="Record and replay which experts a model uses.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Rate = Annotated[float, typer.Option(min=0.001, help="GB/s.")]


@app.command()
def record(
    directory: Annotated[Path, typer.Argument(help="Checkpoint directory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="TRACE", help="A new file.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Decode greedily after this text, and record that.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text to record instead, token by token.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to record at most.")] = 1024,
    gates: Annotated[
        bool, typer.Option("--gates", help="Record the routing weights, too.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32.", show_default="the checkpoint's"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cuda, cuda:1 or cpu.", show_default="the GPU if there is one"),
    ] = None,
    vram: Annotated[str | None, typer.Option(help="GPU memory to keep to, as 16GiB.")] = None,
    ram: Annotated[str | None, typer.Option(help="Host memory to keep to.")] = None,
) -> None:
    """Write which experts each token goes through.

    Example: qmix trace record mixtral-nf4 --data wiki.test.raw --out wiki.trace
    """
    if (prompt is None) == (data is None):
        raise UsageError("give a PROMPT or --data, and not both")
    if out.exists():
        raise UsageError("the file exists", where=str(out), remedy="Choose another name.")
    import qmix
    from qmix.evals.quality import perplexity
    from qmix.evals.routing import record as routing

    text = None if data is None else perplexity.read_text(data).content
    model, tokenizer = qmix.load(directory, dtype=dtype, device=device, vram=vram, ram=ram)
    with terminal.progress() as show:
        tokens = routing.record(
            model,
            tokenizer,
            out,
            name=directory.resolve().name,
            max_new_tokens=max_new_tokens,
            prompt=prompt,
            text=text,
            gates=gates,
            progress=lambda done, total: show("tokens", done, total),
        )
    terminal.notice(f"{out}: {tokens} tokens, {out.stat().st_size} bytes")


@app.command(name="replay")
def replay_trace(
    path: Annotated[Path, typer.Argument(metavar="TRACE", help="As `qmix trace record` makes it.")],
    slots: Annotated[int, typer.Option(min=1, help="Experts that fit the device.")],
    policy: Annotated[
        Literal["heat", "lru", "lfu", "static"], typer.Option(help="What decides who moves in.")
    ] = "heat",
    profile: Annotated[
        Path | None,
        typer.Option(help="A trace whose hottest experts fill the slots at the start."),
    ] = None,
    hbm: Rate = 850.0,
    interconnect: Rate = 25.0,
    cpu: Rate = 60.0,
    expert_mb: Annotated[
        float | None, typer.Option(min=0.000001, help="MB an expert.", show_default="the trace's")
    ] = None,
    dense_mb: Annotated[
        float | None,
        typer.Option(min=0, help="MB of all else a token.", show_default="the trace's"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hit rate, bytes over PCIe and simulated speed of a policy, beside LRU and the optimum.

    hbm, interconnect and cpu are what the device's memory, PCIe and the host's 4-bit products reach.

    Example: qmix trace replay wiki.trace --slots 148 --policy heat --interconnect 25
    """
    from qmix.evals.routing import replay, trace
    from qmix.evals.routing.simulation import Machine

    found = trace.read(path)
    heat = None if profile is None else replay.heat_of(_profile(profile, found), policy)
    machine = _machine(Machine(), found.header, (hbm, interconnect, cpu), (expert_mb, dense_mb))
    rows = replay.compare(found, slots, policy, machine, heat=heat)
    if as_json:
        document = {
            "trace": str(path),
            "slots": slots,
            "experts": found.header.layers * found.header.experts,
            "machine": vars(machine),
            "replays": [row.to_dict() for row in rows],
        }
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        sys.stdout.write(table(rows))


def table(rows: tuple["Replay", ...]) -> str:
    """The replays as a markdown table."""
    paths = {"read": "read over PCIe", "cpu": "CPU", "copy": "copied first"}
    lines = [
        "| policy | misses | hit rate | uploads/token | MB/token over PCIe | tok/s simulated |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {paths[row.path]} | {100 * row.hit_rate:.2f} % | "
            f"{row.uploads_per_token:.3f} | {row.interconnect_bytes_per_token / 1e6:,.2f} | "
            f"{row.tokens_per_s:,.1f} |"
        )
    return "\n".join(lines) + "\n"


def _profile(path: Path, found: "Trace") -> "Trace":
    from qmix.evals.routing import trace

    other = trace.read(path)
    shape = (found.header.layers, found.header.experts)
    if (other.header.layers, other.header.experts) != shape:
        raise UsageError(
            "the profile is of another model",
            where=str(path),
            expected=f"{shape[0]} layers of {shape[1]} experts",
            found=f"{other.header.layers} of {other.header.experts}",
        )
    return other


def _machine(
    default: "Machine",
    header: "Header",
    rates: tuple[float, float, float],
    megabytes: tuple[float | None, float | None],
) -> "Machine":
    """Sizes by the options, else as the trace has them, else Mixtral-8x7B's."""
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
