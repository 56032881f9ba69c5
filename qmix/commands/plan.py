"""`qmix plan`: its options. Computed by qmix.commands.planner, said by qmix.commands.plan_text.

None of them imports torch.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import UsageError
from qmix.kv_format import named as named_kv

Source = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL|CONFIG",
        help="Folder, GGUF file, ORG/NAME of the hub, or a config.json.",
        show_default=False,
    ),
]
Vram = Annotated[
    str | None, typer.Option(help="Device memory: 24G.", show_default="what is free here")
]
Ram = Annotated[
    str | None, typer.Option(help="Host memory: 32G.", show_default="what is free here")
]
Card = Annotated[str | None, typer.Option(help="A GPU by name: 3090, 4090, A100-40, H100.")]
Context = Annotated[
    int | None,
    typer.Option(parser=options.token_count, help="Context in tokens: 8k.", show_default="4096"),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw it too: a new .html, .svg or .png.")
]
Method = Annotated[
    Literal["nf4", "gptq", "auto"] | None,
    typer.Option(
        help="For a model that is not quantized yet.", show_default="nf4; gptq with --for"
    ),
]
GroupSize = Annotated[int | None, typer.Option(help="gptq: inputs per scale.", show_default="128")]
Bits = Annotated[
    float | None, typer.Option(help="auto: bits per quantized weight.", show_default="4.25")
]
Server = Annotated[
    Literal["vllm", "sglang"] | None,
    typer.Option("--for", help="The server that runs it on several GPUs."),
]
Gpus = Annotated[
    int | None, typer.Option("--tp", help="--for: GPUs that share it.", show_default="1")
]
ReplacePlot = Annotated[bool, typer.Option("--force", help="--plot: replace the file.")]


def plan(
    source: Source,
    vram: Vram = None,
    ram: Ram = None,
    card: Card = None,
    ctx: Context = None,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    kv: options.KV = None,
    method: Method = None,
    group_size: GroupSize = None,
    bits: Bits = None,
    program: Server = None,
    tp: Gpus = None,
    plot: Plot = None,
    force: ReplacePlot = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what fits where and how fast it will be.

    Reads headers only, and no weights. Exit 4 if the model cannot fit. With --for, what each of
    --tp GPUs takes under vLLM or SGLang, and how many of which GPU would do.

    Examples:
      qmix plan mixtral-nf4
      qmix plan config.json --card 3090 --ram 64G --ctx 8192 --plot plan.svg
      qmix plan config.json --method auto --bits 2.75 --ram 16G
      qmix plan mixtral-vllm --for vllm --tp 2 --card 4090
    """
    from qmix.commands import plan_served
    from qmix.commands.plan_text import text
    from qmix.commands.planner import PlanRequest, answer

    _check(program, tp, plot, kv)
    if plot is not None:
        from qmix.commands import plan_plot
        from qmix.pages import output_file

        output_file.check(plot, output_file.ANY, force=force, where="--plot")
    with sources.described(source, part=True) as path:
        request = PlanRequest(
            source=path,
            vram=vram,
            ram=ram,
            card=card,
            context=ctx,
            batch=batch,
            kv=named_kv(kv),
            method=method or ("nf4" if program is None else "gptq"),
            group_size=group_size,
            bits=bits,
        )
        if program is not None:
            planned = plan_served.served_plan(request, program, tp or 1)
            terminal.print_result(plan_served.text(planned), planned.to_dict(), as_json=as_json)
            return
        plan_answer = answer(request)
    terminal.print_result(text(plan_answer), plan_answer.to_dict(), as_json=as_json)
    if plot is not None:
        plan_plot.write(plan_answer, plot)
        terminal.message(f"the picture: {plot}")


def _check(program: str | None, tp: int | None, plot: Path | None, kv: str | None) -> None:
    """
    Raises:
        UsageError: an option goes with qmix alone, or with another program alone.
    """
    if tp is not None and program is None:
        raise UsageError("--tp is for --for: qmix itself runs on one GPU")
    if kv == "int8" and program is not None:
        raise UsageError("--kv is for qmix itself, not for --for")
    if plot is not None and program is not None:
        raise UsageError("--plot does not draw --for")
