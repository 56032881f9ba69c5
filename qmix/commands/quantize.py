"""`qmix quantize`: options, calibration text, and the table of what was written.

Knows no method by more than its name. Heavy imports stay inside the functions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qmix.commands import options, sources, terminal
from qmix.commands.processes import Processes, launched
from qmix.errors import UnsupportedError, UsageError
from qmix.hub import made
from qmix.quantities import a_second, duration, gigabytes

if TYPE_CHECKING:
    from qmix.processes.group import Group
    from qmix.quantize.methods import QuantizeRequest
    from qmix.quantize.report import QuantizeReport

# Panels of the help page.
_ROUNDING, _CALIBRATION, _READING = "Rounding", "Calibration (gptq, auto)", "Source and files"

Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="Checkpoint in 16 or 32 bits, or ORG/NAME of the hub.")
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the 4-bit checkpoint.")]
Method = Annotated[
    Literal["nf4", "fp4", "gptq", "rtn", "auto"],
    typer.Option(
        metavar="METHOD",
        help="nf4, fp4, gptq, rtn (nearest), or auto: bits by the loss of each matrix.",
    ),
]
Attention = Annotated[
    Literal["4bit", "bf16"],
    typer.Option(
        help="How to store the attention matrices.",
        rich_help_panel=_ROUNDING,
    ),
]
DoubleQuant = Annotated[
    bool,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="nf4, fp4: store scales in 8 bits, 4.13 bits a weight, not 4.5.",
        show_default="on",
        rich_help_panel=_ROUNDING,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="gptq, rtn: inputs per scale: 32, 64, 128 or -1 (all).",
        show_default="128",
        rich_help_panel=_ROUNDING,
    ),
]
Asymmetric = Annotated[
    bool,
    typer.Option(
        "--asymmetric",
        help="gptq, rtn: a zero point per group; not for vLLM.",
        rich_help_panel=_ROUNDING,
    ),
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="auto: bits per quantized weight, with scales.",
        show_default="4.25",
        rich_help_panel=_ROUNDING,
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text like what the model will see.",
        show_default="Python's documentation",
        rich_help_panel=_CALIBRATION,
    ),
]
Objective = Annotated[
    Literal["layer", "loss"] | None,
    typer.Option(
        help="What changes least: outputs of each matrix, or predictions.",
        show_default="loss",
        rich_help_panel=_CALIBRATION,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        help="Windows cut from the text.", show_default="256", rich_help_panel=_CALIBRATION
    ),
]
Seqlen = Annotated[
    int | None,
    typer.Option(
        parser=options.token_count,
        help="Tokens per window.",
        show_default="2048, or the model's",
        rich_help_panel=_CALIBRATION,
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        help="Merge a LoRA, a folder that PEFT wrote, before rounding.", rich_help_panel=_READING
    ),
]
Requantize = Annotated[
    bool,
    typer.Option(
        "--requantize",
        help="Take a quantized SRC: round again what it decodes to.",
        rich_help_panel=_READING,
    ),
]
DiscardSource = Annotated[
    bool,
    typer.Option(
        "--discard-source",
        help="SRC on the hub: download file by file, and remove each once it is read.",
        rich_help_panel=_READING,
    ),
]
ShardSize = Annotated[
    str, typer.Option(help="Largest output file: 5GB, 500MB.", rich_help_panel=_READING)
]
Resume = Annotated[bool, typer.Option("--resume", help="gptq, auto: continue an interrupted run.")]


def quantize(
    source: Source,
    out: Out,
    method: Method = "nf4",
    attention: Attention = "4bit",
    double_quant: DoubleQuant = True,
    group_size: GroupSize = None,
    asymmetric: Asymmetric = False,
    bits: Bits = None,
    calibration: Calibration = None,
    objective: Objective = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    resume: Resume = False,
    processes: Processes = None,
    adapter: Adapter = None,
    requantize: Requantize = False,
    device: options.Device = None,
    shard_size: ShardSize = options.SHARD_SIZE,
    force: options.Force = False,
    as_json: options.AsJson = False,
    yes: options.Yes = False,
    discard_source: DiscardSource = False,
) -> None:
    """Quantize a checkpoint to 4 bits.

    gptq and auto run calibration text through the model, one layer at a time. Ctrl-C stops after
    the current layer (exit 75); the same command with --resume continues.

    Examples:
      qmix quantize Mixtral-8x7B-Instruct-v0.1 mixtral-nf4
      qmix quantize Mixtral-8x7B-v0.1 mixtral-gptq --method gptq --processes 4
      qmix quantize mistralai/Mixtral-8x7B-v0.1 mixtral-nf4 --discard-source
      qmix quantize Mixtral-8x7B-v0.1 mine-nf4 --adapter my-lora
    """
    shard_bytes = options.shard_bytes(shard_size)  # before torch is imported
    from qmix.quantize.methods import QuantizeRequest

    request = QuantizeRequest(
        method=method,
        attention=attention == "4bit",
        double_quant=double_quant,
        group_size=group_size,
        asymmetric=asymmetric,
        bits=bits,
        calibration=calibration,
        objective=objective,
        samples=samples,
        seqlen=seqlen,
        device=device,
        shard_bytes=shard_bytes,
        resume=resume,
        force=force,
        adapter=adapter,
        requantize=requantize,
        discard_source=discard_source,
        documents=True,
    )
    _quantize(source, out, request, processes, as_json=as_json, yes=yes)


def _quantize(
    source: Path,
    out: Path,
    request: "QuantizeRequest",
    processes: int | None,
    *,
    as_json: bool,
    yes: bool,
) -> None:
    """In one process, or as one of several, or by starting them."""
    group = _group(request, processes)
    if group is None:
        return
    if group.is_first:
        report = _run(source, out, request, group, yes=yes)
        _say_written(report, out, as_json=as_json)
    else:
        _follow(source, request, group, yes=yes)


def _follow(source: Path, request: "QuantizeRequest", group: "Group", *, yes: bool) -> None:
    """Do this process's share, which the first one leads, reports and ends."""
    from qmix.quantize.methods import follow_quantize_checkpoint

    with terminal.interruptible():
        follow_quantize_checkpoint(lambda: sources.local(source, yes=yes), request, group)


def _group(request: "QuantizeRequest", processes: int | None) -> "Group | None":
    """The processes that quantize; None if those that this one has started have done it.

    Raises:
        UsageError: the method is not shared.
        UnsupportedError: the processes run on several machines.
        QmixError: a process was lost.
    """
    from qmix.processes import group

    if not request.calibrated:
        if processes not in (None, 1) or group.processes() > 1:
            raise UsageError(f"--processes does not apply to --method {request.method}")
        return group.ALONE
    if not group.on_one_machine():
        raise UnsupportedError(
            "quantization is shared by the processes of one machine",
            found="processes on several machines",
            remedy="Give accelerate launch --num_machines 1.",
        )
    if launched(processes, kept="Finished layers are kept: continue with --resume."):
        return None
    return group.current()


def _say_written(report: "QuantizeReport", out: Path, *, as_json: bool) -> None:
    draw_report(report, out)
    terminal.message(f"model card: {out / 'README.md'}; pictures: {out / 'qmix_report.html'}")
    made.remember(out)
    if as_json:
        terminal.print_json(report.to_dict())


def _run(
    source: Path, out: Path, request: "QuantizeRequest", group: "Group", *, yes: bool
) -> "QuantizeReport":
    from qmix.formats.files import output_dir
    from qmix.quantize.methods import quantize_checkpoint

    output_dir.check_paths(source, out, force=request.force)  # before a download
    text = _calibration_text(request.calibration) if request.calibrated else None
    with ExitStack() as stack:
        supply = None
        if request.discard_source:
            supply = stack.enter_context(sources.shard_by_shard(source, yes=yes))
        source = sources.local(source, yes=yes) if supply is None else supply.path
        interrupted = stack.enter_context(_interruptible(request.calibrated))
        show = stack.enter_context(terminal.progress())
        return quantize_checkpoint(
            source,
            out,
            request,
            text,
            interrupted=interrupted,
            progress=show,
            supply=supply,
            group=group,
        )


def _interruptible(calibrated: bool) -> AbstractContextManager[Callable[[], bool]]:
    """A run without calibration is not resumable, so Ctrl-C ends it at once."""
    return terminal.interruptible() if calibrated else nullcontext(lambda: False)


def _calibration_text(path: Path | None) -> str:
    from qmix.evals import corpus
    from qmix.evals.quality import texts

    if path is not None:
        text = texts.read_text(path)
        terminal.notice_changes(path, text.changes)
        return text.content
    terminal.notice("calibrating with Python's documentation; --calibration takes your own text")
    return corpus.training_text()


def draw_report(report: "QuantizeReport", out: Path) -> None:
    """What was written, a row a kind of tensor, on stderr."""
    from qmix.quantize.report import KIND_HEADER

    kinds = report.kinds()
    calibrated = any(kind.output_error is not None for kind in kinds)
    shown = len(KIND_HEADER) - (not calibrated)
    terminal.table(KIND_HEADER[:shown], [kind.cells[:shown] for kind in kinds])
    terminal.message(
        f"{out}: {gigabytes(report.bytes_in)} in, {gigabytes(report.bytes_out)} out, "
        f"{report.bits_per_weight:.2f} bits a weight in all, {duration(report.seconds)} "
        f"({a_second(report.bytes_in, report.seconds)})"
    )
    for remark in report.remarks():
        terminal.notice(remark)
    from qmix.text.tokenizer import tokenizer_problem

    if why := tokenizer_problem(out):
        terminal.message(f"qmix: {out} has no tokenizer that works: {why}")
