"""A checkpoint for another program: the first format that keeps every bit and that it loads.

Knows programs only by `formats.readers`, and formats by `export`.
"""

from pathlib import Path

from qmix.commands.checkpoint import Progress
from qmix.commands.checkpoint.export import Export, LossError, export_checkpoint
from qmix.errors import UnsupportedError
from qmix.formats import open_checkpoint
from qmix.formats.compatibility import reader_support, support_of
from qmix.formats.files.shard_names import SHARD_BYTES
from qmix.formats.readers.programs import PROGRAMS, ExportFormat, Program
from qmix.formats.readers.storage import StorageSummary, storage_summary


def export_for(
    source: Path,
    out: Path,
    program: Program,
    *,
    requantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> tuple[ExportFormat, Export]:
    """Write what a program loads; return the format too.

    All weights are read once for each format that is tried, the source's own first.

    Args:
        requantize: if no format keeps every bit, round in the first that the program loads.
        source, out, shard_bytes, force, progress: see `export_checkpoint`.

    Raises:
        UnsupportedError: the program loads nothing that keeps every bit. The error says why of
            each format, and what works instead.
        QmixError: as `export_checkpoint`.
    """
    summary = storage_summary(open_checkpoint(source).metadata)
    _refuse_dense(summary, program, source)
    reasons: dict[str, list[str]] = {}
    lossy = False
    for rounding in (False, True)[: 1 + requantize]:
        for layout in _formats(program, summary):
            try:
                export = export_checkpoint(
                    source,
                    out,
                    layout,
                    requantize=rounding,
                    shard_bytes=shard_bytes,
                    force=force,
                    reader=program,
                    progress=progress,
                )
            except UnsupportedError as error:
                lossy |= isinstance(error, LossError)
                formats = reasons.setdefault(str(error.found or error.what), [])
                formats.append(layout)
            else:
                return layout, export
    raise UnsupportedError(
        f"{PROGRAMS[program].release} loads no format that keeps every bit of it",
        where=str(source),
        found="; ".join(f"{', '.join(dict.fromkeys(f))}: {why}" for why, f in reasons.items()),
        remedy=_nearest(summary, program, rounding=lossy and not requantize),
    )


def _formats(program: Program, summary: StorageSummary) -> list[ExportFormat]:
    """The program's formats, that of the source first: it keeps every bit."""
    own = {layout.lower() for layout in summary.layouts}
    return sorted(PROGRAMS[program].formats, key=lambda layout: layout not in own)


def _refuse_dense(summary: StorageSummary, program: Program, source: Path) -> None:
    """Raise if the source needs no export: 16 bits are loaded by all of them but llama.cpp."""
    if summary.layouts or summary.gguf is not None or program == "llama.cpp":
        return
    raise UnsupportedError(
        f"{PROGRAMS[program].name} loads this folder as it is, in 16 bits",
        where=str(source),
        remedy="For 4 bits: qmix quantize SRC OUT --method gptq, then qmix export --for.",
    )


def _nearest(summary: StorageSummary, program: Program, *, rounding: bool) -> str:
    """What works instead.

    Args:
        rounding: whether a format would hold the weights once they are rounded.
    """
    steps = ["--requantize rounds these weights and states the error of each"] * rounding
    steps.append("qmix quantize ORIGINAL OUT --method gptq makes 4 bits that all of them load")
    if support_of(program, summary).outcome == "loads":
        steps.insert(0, f"{PROGRAMS[program].name} loads the folder as it is")
    loads = ", ".join(it.reader for it in reader_support(summary) if it.outcome == "loads")
    return f"{'; '.join(steps)}. The folder as it is loads in {loads}."
