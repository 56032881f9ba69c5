"""`qmix plan`: a checkpoint or a config, this machine or another, and the plan in words.

Looks at the machine by `machine`, computes by `plan` and `estimate`, draws plain text. Knows no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError, UsageError
from qmix.formats import names
from qmix.formats.files.shard_names import INDEX, SINGLE
from qmix.formats.metadata import read_metadata
from qmix.formats.mistral.detect import refuse_raw
from qmix.planning import gpus as cards
from qmix.planning import machine
from qmix.planning.budget import MemoryBreakdown
from qmix.planning.byte_sizes import parse_size, show
from qmix.planning.estimate import Estimate, Quantization, Speed, estimate, figure, rates_used
from qmix.planning.footprint import StoredModel
from qmix.planning.gpus import Card
from qmix.planning.plan import plan
from qmix.planning.roofline import Rate, Rates
from qmix.weights.scheme import DENSE, Scheme

# Where nothing was measured: two channels of DDR4 as a matrix-vector product reads them (38 GB/s in
# reference formulas' table), and an NVMe drive read an expert at a time (assumed).
_HOST = Rate(38e9, "assumed: two channels of DDR4")
_DISK = Rate(2e9, "assumed: an NVMe drive")


# Nobody decodes a batch of one faster than this: a step's launches take longer than its bytes.
_FASTEST = 1000
# Forty times the 8x7B's: a config of a few bytes may ask for millions.
_MOST_WEIGHTS = 40_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks; sizes as written, None where nothing was said."""

    source: Path
    vram: str | None = None
    ram: str | None = None
    card: str | None = None
    context: int | None = None
    batch: int = 1
    method: str = "nf4"
    group_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An estimate, and what it was computed for.

    Attributes:
        place: the device or machine, in words. notes: what should be known of the figures.
    """

    estimate: Estimate
    place: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As a JSON document."""
        return {"place": self.place, "notes": list(self.notes), **self.estimate.to_dict()}


def answer(request: Request) -> Answer:
    """Plan for what is asked, on the machine that is there unless a card or sizes are given.

    Raises:
        QmixError: the source is damaged, a size is none, or it cannot fit (ResourceError).
    """
    vram = None if request.vram is None else parse_size(request.vram, where="--vram", least=1 << 20)
    ram = None if request.ram is None else parse_size(request.ram, where="--ram", least=1 << 20)
    card = None if request.card is None else cards.find(request.card)
    target, source = _models(request)
    here, notes = _here(), []
    gpu = here.gpu if card is None else None
    if gpu is not None and vram is not None and vram > gpu.total:
        gpu = None  # another card is meant
    if vram is None:
        vram = card.vram if card else (gpu.free if gpu else None)
    elsewhere = card is not None or (vram is not None and gpu is None)
    on_device = vram is not None
    if ram is None:
        ram = None if elsewhere else here.memory.available
    if card is None and on_device:
        assert vram is not None
        card = cards.known(gpu.name) if gpu else cards.of_size(vram)
    planned = plan(
        target, gpu=on_device, vram=vram, ram=ram, context=request.context, batch=request.batch
    )
    if here.trouble:
        notes.append(here.trouble)
    if not elsewhere and here.measured is None:
        notes.append(
            "nothing was measured here: qmix doctor --measure gives this machine's own rates"
        )
    if card is not None and not card.supported:
        notes.append(
            f"the 4-bit kernels need compute capability 8.0 and a {card.name} has "
            f"{card.capability[0]}.{card.capability[1]}: it would be far slower than the bound"
        )
    rates = _rates(here, card, elsewhere=elsewhere)
    return Answer(
        estimate=estimate(planned, rates, source),
        place=_place(request, gpu, card, on_device=on_device, vram=vram, ram=ram),
        notes=tuple(notes),
    )


def _models(request: Request) -> tuple[StoredModel, StoredModel | None]:
    """What will run, and the 16-bit checkpoint that it is made from if it is still to be quantized."""
    path = request.source
    scheme = _scheme(request)
    if not path.exists():
        raise CheckpointError(
            "no such directory or file",
            where=str(path),
            remedy="Give a checkpoint's folder, or a config.json.",
        )
    if path.is_dir():
        refuse_raw(path)
    folder_has_weights = path.is_dir() and (
        (path / INDEX).is_file() or (path / SINGLE).is_file() or any(path.glob("*.safetensors"))
    )
    if folder_has_weights:
        stored = StoredModel.of(read_metadata(path))
        if not stored.dense:
            return stored, None
        return StoredModel.assume(stored.name, stored.config, scheme), stored
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            "neither a checkpoint nor a config.json there",
            where=str(path),
            remedy="Give a checkpoint's folder, or a config.json.",
        )
    config = MixtralConfig.from_dict(strict_json.read(file), where=str(file))
    if names.count(config) > _MOST_WEIGHTS:
        raise UnsupportedError(
            "too many weights to plan for",
            where=str(file),
            expected=f"at most {_MOST_WEIGHTS}",
            found=names.count(config),
        )
    name = file.resolve().parent.name
    return StoredModel.assume(name, config, scheme), StoredModel.assume(name, config, DENSE)


def _scheme(request: Request) -> Scheme:
    if request.method == "nf4":
        if request.group_size is not None:
            raise UsageError("--group-size means nothing to --method nf4")
        return Scheme(kind="nf4")
    size = 128 if request.group_size is None else request.group_size
    if size not in (-1, 32, 64, 128):
        raise UsageError(
            "no such group size",
            where="--group-size",
            expected="-1 or one of 32, 64, 128",
            found=size,
        )
    return Scheme(kind="int4", group_size=size)


@dataclass(frozen=True, kw_only=True)
class _Here:
    memory: machine.HostMemory
    gpu: machine.Gpu | None
    measured: machine.Measured | None
    trouble: str | None


def _here() -> _Here:
    gpus = machine.gpus()
    gpu = gpus[0] if gpus else None
    found = machine.measurements(machine.key(gpu.name if gpu else None))
    return _Here(memory=machine.memory(), gpu=gpu, measured=found.measured, trouble=found.trouble)


def _rates(here: _Here, card: Card | None, *, elsewhere: bool) -> Rates:
    """Measured where the plan is for this machine and it was measured, else tables and assumptions."""
    measured = None if elsewhere else here.measured
    device = (
        Rate(0.9e12, "assumed")
        if card is None
        else Rate(
            card.read_bandwidth,
            f"{cards.READ_SHARE:.0%} of the {card.name}'s data sheet, {card.bandwidth / 1e9:,.0f}",
        )
    )
    generation = 4 if card is None else card.pcie
    interconnect = Rate(
        cards.PCIE_BANDWIDTH[generation], f"pinned memory over PCIe {generation} x16, table"
    )
    host, disk = _HOST, _DISK
    if measured is not None:
        told = f"measured here on {measured.date[:10]}"
        host = Rate(measured.host_read, told)
        disk = Rate(measured.disk_read, told) if measured.disk_read else disk
        device = Rate(measured.device_copy, told) if measured.device_copy else device
        interconnect = Rate(measured.interconnect, told) if measured.interconnect else interconnect
    return Rates(device=device, interconnect=interconnect, host=host, disk=disk)


def _place(
    request: Request,
    gpu: machine.Gpu | None,
    card: Card | None,
    *,
    on_device: bool,
    vram: int | None,
    ram: int | None,
) -> str:
    memory = "any amount of host memory" if ram is None else f"{show(ram)} of host memory"
    if not on_device:
        model, _ = machine.processor()
        return f"{model}, {machine.cores()} cores, {memory}, no GPU"
    assert vram is not None
    if gpu is not None:
        name = gpu.name
    elif request.card is not None and card is not None:
        name = card.name
    else:
        name = f"a card as fast as an {card.name}" if card else "a card"
    return f"{name}, {show(vram)} of device memory, {memory}"


def text(found: Answer) -> str:
    """The answer for a person to read."""
    seen = found.estimate
    planned, model = seen.plan, seen.plan.model
    how = "as stored" if model.assumed is None else f"as {model.assumed}, assumed"
    config = model.config
    lines = [
        f"{model.name}: {config.num_hidden_layers} layers of {config.num_local_experts} experts, {how}",
        f"on {found.place}, context {planned.context}"
        + (f", batch {planned.batch}" if planned.batch > 1 else ""),
        "",
        *_verdict(seen),
        "",
    ]
    if planned.gpu:
        lines += _table("device memory", planned.device_memory, planned.vram)
        lines.append("")
    lines += _table("host memory", planned.host_memory, planned.ram)
    lines += ["", *_speed_lines(seen)]
    lines += [_quantization_line(one) for one in seen.quantization]
    lines += [f"would help  {one.change}: {one.yields}" for one in seen.suggestions]
    lines += [f"note        {note}" for note in found.notes]
    return "\n".join(lines) + "\n"


def _verdict(seen: Estimate) -> list[str]:
    planned = seen.plan
    best = max(seen.speeds, key=lambda speed: speed.expected)
    head = f"about {figure(best.expected)} tokens a second"
    if best.bound > _FASTEST:
        head = "so small that launches and not bytes decide its speed"
    place = "device memory" if planned.gpu else "host memory"
    if planned.resident:
        where = f"fits: all {planned.experts} experts in {place}"
    elif planned.gpu:
        where = (
            f"fits with experts on the host: {planned.slots} of {planned.experts} in device memory"
        )
        where += f", {planned.host} in host memory"
        if planned.disk:
            where += f", {planned.disk} on the disk only"
    else:
        where = f"fits with the disk: {planned.host} of {planned.experts} experts in host memory"
        where += f", {planned.disk} read from the file when needed"
    contexts = f"largest context {planned.largest_context}"
    if planned.resident_context and planned.resident_context < planned.largest_context:
        contexts += f"; {planned.resident_context} with all experts in {place}"
    return [f"{where}; {head}", contexts]


def _table(title: str, breakdown: MemoryBreakdown, budget: int | None) -> list[str]:
    rows = [(item.what, item.nbytes) for item in breakdown.items if item.nbytes]
    room = "" if budget is None else f" of {show(budget)}"
    return [f"{title:26} {show(breakdown.total):>12}{room}"] + [
        f"  {what:24} {show(nbytes):>12}" for what, nbytes in rows
    ]


_MEANING = {
    "resident": "all experts in device memory",
    "interconnect": "misses read over PCIe",
    "cpu": "misses computed on the CPU",
    "host": "everything in host memory",
    "host and disk": "misses read from the disk",
}


def _speed_lines(seen: Estimate) -> list[str]:
    lines = [_speed_line(speed) for speed in seen.speeds]
    names = {"device": "device", "interconnect": "PCIe", "host": "host", "disk": "disk"}
    for name in rates_used(seen.speeds):
        rate = getattr(seen.rates, name)
        lines.append(f"{names[name]:11} {figure(rate.bandwidth / 1e9)} GB/s ({rate.source})")
    return lines


def _speed_line(speed: Speed) -> str:
    return (
        f"decode      {_MEANING[speed.path]}: bound {figure(speed.bound)} tok/s "
        f"({figure(speed.bound_full)} with the context full); {100 * speed.share:.0f} % of it, the goal, "
        f"is {figure(speed.expected)}"
    )


def _quantization_line(one: Quantization) -> str:
    scratch = f", {show(one.scratch)} more while it runs" if one.scratch else ""
    device = f", {_time(one.gpu_seconds)} on a large GPU" if one.gpu_seconds else ""
    return (
        f"quantize    --method {one.method}: {show(one.bytes_in)} read, {show(one.bytes_out)} "
        f"written{scratch}, {show(one.peak)} of memory, {_time(one.seconds)} on two processors{device} "
        f"({one.source})"
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
