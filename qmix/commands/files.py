"""`qmix convert`, `export`, `inspect` and `verify`: commands over checkpoint files.

No model is run. What they do is in qmix.commands.checkpoint; heavy imports stay inside the
functions.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qmix.commands import options, sources, terminal
from qmix.errors import UsageError
from qmix.hub import made
from qmix.printable import escaped
from qmix.quantities import a_second, counted, duration, gigabytes, weights

if TYPE_CHECKING:
    from qmix.commands.checkpoint.convert import Conversion
    from qmix.commands.checkpoint.export import Export
    from qmix.commands.checkpoint.inspect import Inventory
    from qmix.formats.compatibility import ReaderSupport
    from qmix.formats.layouts.targets import Format
    from qmix.formats.readers.programs import Program


ForProgram = Annotated[
    Literal["vllm", "sglang", "transformers", "llama.cpp"] | None,
    typer.Option("--for", help="The program that is to load it.", show_default=False),
]


def convert(
    raw: Annotated[
        Path,
        typer.Argument(
            metavar="RAW",
            help="Consolidated.* files, FP8 checkpoint, GGUF file, or ORG/NAME of the hub.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory in the hub's layout.")],
    shard_size: options.ShardSize = options.SHARD_SIZE,
    force: options.Force = False,
    as_json: options.AsJson = False,
    yes: options.Yes = False,
) -> None:
    """Turn Mistral's own files, GGUF or FP8 into 16 bits.

    OUT has the hub's layout. RAW holds consolidated.* files and a params.json, and every number is
    copied bit for bit; or FP8 weights in the hub's layout, or is a GGUF file, and each weight is
    rounded once.

    Examples:
      qmix convert Mixtral-8x7B-v0.1-raw Mixtral-8x7B-v0.1
      qmix convert mixtral-Q8_0.gguf mixtral-bf16 --shard-size 2GB
    """
    shard_bytes = options.shard_bytes(shard_size)
    from qmix.formats.files import output_dir

    output_dir.check_paths(raw, out, force=force)  # before a download
    raw = sources.local(raw, yes=yes, need="raw")
    from qmix.commands.checkpoint.convert import convert_checkpoint
    from qmix.commands.checkpoint.dequantize import dequantize_checkpoint
    from qmix.files import regular_file
    from qmix.formats.mistral.detect import raw_files
    from qmix.gguf.files import is_gguf

    if is_gguf(raw) or (regular_file.exists(raw / "config.json") and not raw_files(raw)):
        with terminal.progress() as show:
            done = dequantize_checkpoint(
                raw, out, shard_bytes=shard_bytes, force=force, progress=show
            )
        terminal.message(
            f"{out}: {counted(done.weights, 'weight')} from {done.source} to {done.dtype}, "
            f"{_written(done.bytes_out, done.seconds)}"
        )
        made.remember(out)
        if as_json:
            terminal.print_json({"out": str(out), **asdict(done)})
        return
    with terminal.progress() as show:
        result = convert_checkpoint(raw, out, shard_bytes=shard_bytes, force=force, progress=show)
    _draw_conversion(result, out)
    made.remember(out)
    if as_json:
        terminal.print_json({"out": str(out), **asdict(result)})


def export(
    directory: options.Directory,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New directory for the other format.")],
    layout: Annotated[
        Literal["gptq", "awq", "compressed-tensors", "mlx", "gguf", "nf4"] | None,
        typer.Option("--format", "--to", help="What to write.", show_default=False),
    ] = None,
    program: ForProgram = None,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Round what the format does not hold.")
    ] = False,
    shard_size: options.ShardSize = options.SHARD_SIZE,
    force: options.Force = False,
    as_json: options.AsJson = False,
    yes: options.Yes = False,
) -> None:
    """Write a quantized checkpoint in another format, bit for bit.

    --for writes what a program loads, and says how to serve it. --format names the format:
    gptq, awq (gemm) and compressed-tensors are for vLLM and SGLang, mlx for mlx-lm, gguf for
    llama.cpp, nf4 for bitsandbytes. What a format does not hold is named by kind, and nothing is
    written. With --requantize it is rounded, and the error of each weight is measured and goes
    into qmix_report.json. gguf also takes checkpoints in 16 bits.

    Examples:
      qmix export mixtral-gptq mixtral-vllm --for vllm
      qmix export mixtral-gptq mixtral-gguf --format gguf
    """
    if (layout is None) == (program is None):
        raise UsageError("say what to write: --for PROGRAM or --format FORMAT, and not both")
    shard_bytes = options.shard_bytes(shard_size)
    from qmix.formats.files import output_dir

    output_dir.check_paths(directory, out, force=force)  # before a download
    directory = sources.local(directory, yes=yes)
    written, result = _exported(
        directory, out, layout, program, requantize=requantize, shard_bytes=shard_bytes, force=force
    )
    _draw_export(result, out)
    if program is not None:
        _draw_serving(program, written, out)
    made.remember(out)
    if as_json:
        terminal.print_json({"out": str(out), "format": written, **result.to_dict()})


def _exported(
    directory: Path,
    out: Path,
    layout: "Format | None",
    program: "Program | None",
    *,
    requantize: bool,
    shard_bytes: int,
    force: bool,
) -> "tuple[Format, Export]":
    """Write one format, or the one that a program loads; return which."""
    from qmix.commands.checkpoint.export import export_checkpoint
    from qmix.commands.checkpoint.export_for import export_for

    with terminal.progress() as show:
        if layout is None:
            assert program is not None
            return export_for(
                directory,
                out,
                program,
                requantize=requantize,
                shard_bytes=shard_bytes,
                force=force,
                progress=show,
            )
        result = export_checkpoint(
            directory,
            out,
            layout,
            requantize=requantize,
            shard_bytes=shard_bytes,
            force=force,
            progress=show,
        )
    return layout, result


def inspect(
    directory: options.Directory, program: ForProgram = None, as_json: options.AsJson = False
) -> None:
    """Show what a checkpoint holds, who made it and who loads it.

    Reads headers only. --for says whether one program loads it, why not, and what would.

    Examples:
      qmix inspect mixtral-nf4 --for vllm
      qmix inspect mistralai/Mixtral-8x7B-Instruct-v0.1 --json
    """
    from qmix.commands.checkpoint.inspect import inspect

    with sources.described(directory) as folder:
        inventory = inspect(folder)
    if not folder.exists():  # only its headers were fetched
        inventory = replace(inventory, directory=directory)
    if program is None:
        terminal.print_result(_inventory_text(inventory), inventory.to_dict(), as_json=as_json)
        return
    support = inventory.support_of(program)
    terminal.print_result(
        _support_text(program, support, directory), asdict(support), as_json=as_json
    )


def verify(
    directory: options.Directory, as_json: options.AsJson = False, yes: options.Yes = False
) -> None:
    """Check a checkpoint to the last number; exit 3 if it is damaged.

    Hashes, the exact tensor set, finite values.

    Examples:
      qmix verify mixtral-nf4
      qmix verify mixtral-gptq --json
    """
    from qmix.commands.checkpoint.verify import verify

    directory = sources.local(directory, yes=yes)
    with terminal.progress() as show:
        result = verify(directory, show)
    for problem in result.problems[1:]:
        terminal.notice(str(problem))
    text = ""
    if not result.problems:
        read, hashed = counted(result.weights, "weight"), counted(result.hashed, "file")
        text = f"ok: {read} read, {hashed} hashed\n"
    failure = next(iter(result.problems), None)
    terminal.print_result(text, result.to_dict(), as_json=as_json, failure=failure)


def _draw_export(result: "Export", out: Path) -> None:
    for note in result.notes:
        terminal.notice(str(note))
    for kind in result.losses:
        terminal.notice(f"rounded: {kind}")
    if result.rounded:
        worst = max(result.rounded, key=lambda weight: weight.relative_error)
        terminal.notice(
            f"relative error of the rounded weights {result.relative_error:.2e}, at most "
            f"{worst.relative_error:.2e} ({worst.name}); of each: qmix_report.json"
        )
    terminal.notice(
        f"{out}: {counted(result.weights, 'weight')}, {len(result.rounded)} of them rounded, "
        f"{_written(result.bytes_out, result.seconds)}"
    )


def _draw_serving(program: "Program", layout: str, out: Path) -> None:
    """How the program serves what was written for it."""
    from qmix.formats.readers.programs import PROGRAMS

    examined = PROGRAMS[program]
    terminal.message(f"{layout}, for {examined.release}: {examined.serving(out)}")


def _support_text(program: "Program", support: "ReaderSupport", directory: Path) -> str:
    """Whether a program loads a checkpoint, why not, what would, and where that is written."""
    from qmix.formats.readers.programs import PROGRAMS

    examined = PROGRAMS[program]
    lines = [f"{support.reader} {support.outcome}: {support.reason}".removesuffix(": ")]
    how = (
        "it was run with tiny Mixtrals" if support.tried else "its source was read, it was not run"
    )
    lines.append(f"known from: {examined.source} ({how})")
    if support.outcome == "loads":
        lines.append(f"serve: {examined.serving(directory)}")
    else:
        formats = ", ".join(examined.formats)
        lines.append(f"it loads: {formats}; qmix export {directory} OUT --for {program}")
    return "\n".join(map(escaped, lines)) + "\n"


def _draw_conversion(result: "Conversion", out: Path) -> None:
    if result.ignored:
        terminal.notice(f"ignored in params.json: {', '.join(result.ignored)}")
    if result.tokenizer is None:
        terminal.notice(
            f"there is no tokenizer: put the model's tokenizer.model into {out} before you "
            "generate or chat"
        )
    elif result.tokenizer != "tokenizer.model":
        terminal.notice(f"{result.tokenizer} became tokenizer.model")
    terminal.message(
        f"{out}: {counted(result.tensors, 'tensor')}, {weights(result.parameters)} weights in "
        f"{result.dtype}, {_written(result.bytes_out, result.seconds)}"
    )


def _written(nbytes: int, seconds: float) -> str:
    return f"{gigabytes(nbytes)}, {duration(seconds)} ({a_second(nbytes, seconds)})"


def _inventory_text(inventory: "Inventory") -> str:
    lines = [
        f"{group.kind:10} {group.layout:19} {group.scheme:25} "
        f"{counted(group.weights, 'tensor'):>13} {weights(group.parameters):>8} "
        f"{group.bits_per_weight:7.3f} bits/weight"
        for group in inventory.groups
    ]
    lines.append(
        f"{counted(len(inventory.files), 'file')}, {gigabytes(inventory.stored_bytes)}, "
        f"{weights(inventory.parameters)} weights, {inventory.bits_per_weight:.3f} bits each"
    )
    lines.append(
        f"loaded: {gigabytes(inventory.loaded_bytes)} of host memory, "
        f"{8 * inventory.loaded_bytes / inventory.parameters:.3f} bits a weight"
    )
    if inventory.maker:
        lines.append(f"maker: {inventory.maker}")
    if inventory.not_quantized:
        lines.append(f"not quantized: {', '.join(inventory.not_quantized)}")
    for support in inventory.readers:
        reason = support.reason if support.tried else f"{support.reason} (not tried)".lstrip()
        lines.append(f"{support.reader:18} {support.outcome:8} {reason}".rstrip())
    return "\n".join(map(escaped, lines)) + "\n"
