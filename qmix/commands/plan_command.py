"""`qmix plan` and `qmix doctor`: what fits on which machine, and what this one has.

Parses and prints. Heavy imports stay inside the commands; `plan` imports no torch.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from qmix.commands import terminal

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def plan(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|CONFIG", help="Checkpoint, or a config.json.", show_default=False
        ),
    ],
    vram: Annotated[
        str | None, typer.Option(help="Device memory: 24G.", show_default="what is free here")
    ] = None,
    ram: Annotated[
        str | None, typer.Option(help="Host memory: 32G.", show_default="what is free here")
    ] = None,
    card: Annotated[
        str | None, typer.Option(help="A card by name: 3090, 4090, A100-40, H100.")
    ] = None,
    ctx: Annotated[int | None, typer.Option(help="Context in tokens.", show_default="4096")] = None,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    method: Annotated[
        Literal["nf4", "gptq"], typer.Option(help="Of a model that is not quantized yet.")
    ] = "nf4",
    group_size: Annotated[
        int | None, typer.Option(help="gptq: inputs a scale.", show_default="128")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What fits where and how fast it will be, from headers alone. Exit 4 if it cannot fit.

    Examples: qmix plan mixtral-nf4 · qmix plan config.json --card 3090 --ram 64G --ctx 8192
    """
    from qmix.commands import plan as planner

    found = planner.answer(
        planner.Request(
            source=source,
            vram=vram,
            ram=ram,
            card=card,
            context=ctx,
            batch=batch,
            method=method,
            group_size=group_size,
        )
    )
    sys.stdout.write(json.dumps(found.to_dict()) + "\n" if as_json else planner.text(found))


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time memory, disk and GPU, and keep it for plans.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What this machine has, what would be slow or fail on it, and the remedy.

    Example: qmix doctor --measure
    """
    from qmix.commands import doctor

    with terminal.progress() as show:
        report = doctor.examine(Path.cwd(), measure=measure, progress=show)
    sys.stdout.write(json.dumps(report.to_dict()) + "\n" if as_json else report.text())
