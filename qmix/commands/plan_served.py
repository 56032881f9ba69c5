"""`qmix plan --for`: what each GPU takes when another program serves the model, and which GPUs do.

Computes with qmix.planning and says it; knows no torch.
"""

from dataclasses import dataclass

from qmix.commands.planner import PlanRequest, models_of
from qmix.errors import ResourceError, UnsupportedError, UsageError
from qmix.formats.compatibility import support_of
from qmix.formats.metadata import read_metadata
from qmix.formats.readers.programs import PROGRAMS, ExaminedProgram, ServerProgram
from qmix.formats.readers.storage import storage_summary
from qmix.planning import gpus
from qmix.planning.byte_sizes import parse_size, show
from qmix.planning.gpus import CARDS
from qmix.planning.stored_model import StoredModel
from qmix.planning.tensor_parallel import GpuShare, share
from qmix.printable import escaped
from qmix.quantities import counted

_CONTEXT = 4096
_GROUPS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class ServedPlan:
    """What each GPU of a group takes.

    Attributes:
        model: as it is stored.
        program: that serves it.
        share: of one GPU.
        card, vram: the GPU that was asked for, in words and in bytes; None if none was.
        fitting: of each GPU of the table, how many hold the model; only those that can.
        note: why the program would not load the folder as it is; "" if it would.
    """

    model: StoredModel
    program: ExaminedProgram
    context: int
    batch: int
    share: GpuShare
    card: str | None
    vram: int | None
    fitting: dict[str, int]
    note: str

    @property
    def budget(self) -> int | None:
        """Bytes of each GPU that the program uses unless told otherwise."""
        return None if self.vram is None else _budget(self.program, self.vram)

    @property
    def positions(self) -> int | None:
        """Positions of all requests together that fit."""
        return None if self.budget is None else self.share.positions(self.budget)

    def to_dict(self) -> dict[str, object]:
        """As a JSON document."""
        return {
            "model": self.model.name,
            "assumed": None if self.model.assumed is None else str(self.model.assumed),
            "program": self.program.release,
            "gpus": self.share.gpus,
            "context": self.context,
            "batch": self.batch,
            "each_gpu": self.share.memory.to_dict(),
            "each_gpu_bytes": self.share.memory.total,
            "card": self.card,
            "budget_bytes": self.budget,
            "positions": self.positions,
            "gpus_that_hold_it": self.fitting,
            "note": self.note,
        }


def served_plan(request: PlanRequest, program: ServerProgram, tp: int) -> ServedPlan:
    """Plan for `tp` equal GPUs.

    Raises:
        QmixError: the source is damaged, the model cannot be split so, or a share does not fit the
            GPU that was named (ResourceError).
    """
    if not 1 <= tp <= 1024:
        raise UsageError("out of range", where="--tp", expected="1 to 1024", found=tp)
    if request.ram is not None:
        raise UsageError("--ram does not apply to --for: these programs keep all of it on the GPUs")
    card, vram = _gpu(request)
    model, _ = models_of(request)
    context = _context(model, request.context)
    planned = ServedPlan(
        model=model,
        program=PROGRAMS[program],
        context=context,
        batch=request.batch,
        share=share(model, tp, context, request.batch),
        card=card,
        vram=vram,
        fitting=_fitting(model, PROGRAMS[program], context, request.batch),
        note=_note(request, model, program),
    )
    _check_fit(planned)
    return planned


def text(planned: ServedPlan) -> str:
    """The plan for a person to read."""
    model, each = planned.model, planned.share
    how = "as stored" if model.assumed is None else f"as {model.assumed}, assumed"
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    limit = ""
    if planned.budget is not None:
        share, option = planned.program.memory_share, planned.program.share_option
        limit = f" of {show(planned.budget)}: {share} of {planned.card} ({option})"
    lines = [
        f"{model.name}: {counted(layers, 'layer')} of {counted(experts, 'expert')}, {how}",
        f"for {planned.program.release} on {counted(each.gpus, 'GPU')}, context {planned.context}, "
        f"batch {planned.batch}",
        "",
        f"{'each GPU':26} {show(each.memory.total):>12}{limit}",
        *(f"  {item.what:24} {show(item.nbytes):>12}" for item in each.memory.items),
        "",
    ]
    if planned.positions is not None:
        lines.append(f"room for {planned.positions:,} positions of all requests together")
    held = ", ".join(f"{count} x {card}" for card, count in planned.fitting.items())
    lines.append(f"held by   {held or 'no GPU of the table, up to 8 of one kind'}")
    lines.append(f"serve     {planned.program.serving('FOLDER', each.gpus)}")
    lines += [f"note      {planned.note}"] if planned.note else []
    return "\n".join(map(escaped, lines)) + "\n"


def _gpu(request: PlanRequest) -> tuple[str | None, int | None]:
    """The GPU that was named: in words, and its memory."""
    if request.card is not None:
        card = gpus.find(request.card)
        return f"the {card.name}", card.vram
    if request.vram is not None:
        vram = parse_size(request.vram, where="--vram", least=1 << 20)
        return f"a GPU of {show(vram)}", vram
    return None, None


def _context(model: StoredModel, asked: int | None) -> int:
    most = model.config.max_position_embeddings
    if asked is not None and not 1 <= asked <= most:
        raise UsageError("out of range", where="--ctx", expected=f"1 to {most}", found=asked)
    return asked or min(_CONTEXT, most)


def _budget(program: ExaminedProgram, vram: int) -> int:
    return int((program.memory_share or 1) * vram)


def _fitting(
    model: StoredModel, program: ExaminedProgram, context: int, batch: int
) -> dict[str, int]:
    """The fewest of each GPU of the table that hold the model."""
    shares = []
    for count in _GROUPS:
        try:
            shares.append(share(model, count, context, batch))
        except UnsupportedError:
            continue
    fewest = {}
    for card in CARDS:
        budget = _budget(program, card.vram)
        found = (each.gpus for each in shares if each.memory.total <= budget)
        if card.supported and (fitting := next(found, None)):
            fewest[card.name] = fitting
    return fewest


def _note(request: PlanRequest, model: StoredModel, program: ServerProgram) -> str:
    """Why the program would not load the folder as it is."""
    if model.assumed is not None:
        return ""
    support = support_of(program, storage_summary(read_metadata(request.source)))
    if support.outcome == "loads":
        return ""
    return f"{support.reader} would not load this folder ({support.reason}): qmix export --for"


def _check_fit(planned: ServedPlan) -> None:
    if planned.budget is None or planned.share.memory.total <= planned.budget:
        return
    held = ", ".join(f"{count} x {card}" for card, count in planned.fitting.items())
    raise ResourceError(
        "the model's share does not fit the GPU",
        where=f"--tp {planned.share.gpus} on {planned.card}",
        expected=f"at most {show(planned.budget)}",
        found=show(planned.share.memory.total),
        remedy=f"These hold it: {held}." if held else "Shorten --ctx, or lower --batch.",
    )
