"""A plan as bars: what device memory, host memory and the disk hold of a model.

Knows what it draws, and not how it was computed.
"""

from collections.abc import Mapping
from pathlib import Path

from qmix.commands.planner import PlanAnswer
from qmix.files import atomic_file
from qmix.pages import charts, output_file
from qmix.pages.charts import Series
from qmix.pages.page import Page, Picture, Section, Table, html
from qmix.planning.budget import MemoryBreakdown
from qmix.planning.byte_sizes import show
from qmix.planning.plan import Plan

# What bars are made of: fewer parts than items, so that each has a pattern of its own.
_PARTS: Mapping[str, tuple[str, ...]] = {
    "experts": ("experts",),
    "attention, router and norms": ("attention", "router and norms"),
    "embeddings and head": ("embeddings", "head", "embeddings and head"),
    "KV cache": ("KV cache",),
    "workspace": ("decode workspace", "prefill workspace", "workspace", "loading", "read buffers"),
    "scales as they were read": ("scales as they were read",),
    "process, CUDA and reserve": ("process", "CUDA context", "reserve"),
}
_REST = "other"


def write(answer: PlanAnswer, path: Path) -> None:
    """Draw the plan into a file, as its suffix says.

    Raises:
        WriteError: it cannot be written.
    """
    planned = answer.estimate.plan
    picture = _picture(answer)
    if path.suffix.lower() != output_file.PAGE:
        output_file.write_picture(path, picture.figure, picture.alt)
        return
    page = Page(
        title=f"{planned.model.name}: what lies where",
        lead=f"On {answer.place}, context {planned.context}, batch {planned.batch}.",
        facts=tuple(("note", note) for note in answer.notes),
        sections=(Section("Memory", (), (picture,)),),
    )
    atomic_file.write(path, html(page))


def _rows(planned: Plan) -> dict[str, tuple[MemoryBreakdown | None, int | None]]:
    """The bars by name: what each holds, and its budget; the disk has no items."""
    host = {"host memory": (planned.host_memory, planned.ram), "disk": (None, None)}
    if planned.gpu:
        return {"device memory": (planned.device_memory, planned.vram), **host}
    return {**host}


def _picture(answer: PlanAnswer) -> Picture:
    planned = answer.estimate.plan
    rows = _rows(planned)
    on_disk = planned.disk * planned.expert_bytes
    sums: dict[str, list[int]] = {part: [0] * len(rows) for part in (*_PARTS, _REST)}
    items = []
    for row, (name, (breakdown, _)) in enumerate(rows.items()):
        held = {"experts": on_disk} if breakdown is None else breakdown.to_dict()
        for what, nbytes in held.items():
            sums[_part(what)][row] += nbytes
            if nbytes:
                items.append((name, what, show(nbytes)))
    largest = max(sum(column) for column in zip(*sums.values(), strict=True))
    unit, scale = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    parts = [
        Series("", part, style, tuple(nbytes / scale for nbytes in values))
        for style, (part, values) in enumerate(sums.items())
        if any(values)
    ]
    limits = [None if limit is None else limit / scale for _, limit in rows.values()]
    totals = [sum(values[row] for values in sums.values()) for row in range(len(rows))]
    said = ", ".join(f"{name} {show(total)}" for name, total in zip(rows, totals, strict=True))
    return Picture(
        "plan",
        f"{planned.model.name} on {answer.place}",
        "A thick line is the limit of a memory. On the disk are the experts that lie only in "
        "the file.",
        f"What lies where: {said}.",
        charts.stacks(list(rows), parts, limits, unit),
        (Table("All items", ("memory", "what", "size"), tuple(items)),),
    )


def _part(what: str) -> str:
    return next((part for part, items in _PARTS.items() if what in items), _REST)
