"""From what a user asks of `qmix plan` to an estimate: which model, which machine, how fast.

Looks at files' headers and at this machine; qmix.planning computes. Knows no torch and no terminal.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qmix import strict_json
from qmix.config import MixtralConfig
from qmix.errors import CheckpointError, UnsupportedError, UsageError
from qmix.files import regular_file
from qmix.files.file_names import visible
from qmix.formats import names
from qmix.formats.files.shard_names import INDEX
from qmix.formats.metadata import read_metadata
from qmix.formats.mistral.detect import refuse_raw
from qmix.gguf.files import is_gguf
from qmix.kv_format import KVFormat
from qmix.planning import gpus, machine
from qmix.planning.byte_sizes import parse_size, show
from qmix.planning.estimate import Estimate, estimate
from qmix.planning.gpus import Card
from qmix.planning.plan import plan
from qmix.planning.roofline import Rate, Rates
from qmix.planning.stored_model import StoredModel
from qmix.quantities import counted
from qmix.quantize.calibrated.bit_allocation import DEFAULT_BITS, alike, choices_for
from qmix.weights.scheme import DENSE, Scheme, check_group_size

# Where nothing was measured: two channels of DDR4 as a matrix-vector product reads them (38 GB/s),
# and an NVMe drive read an expert at a time.
_HOST = Rate(38e9, "assumed: two channels of DDR4")
_DISK = Rate(2e9, "assumed: an NVMe drive")
_DEVICE = Rate(0.9e12, "assumed")
_PCIE_GENERATION = 4
# Forty times the 8x7B's: a config of a few bytes may ask for millions.
_MOST_WEIGHTS = 40_000


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a user asks; sizes as written, None where nothing was said.

    Attributes:
        source: a checkpoint's folder, a GGUF file, or a config.json.
        vram, ram: budgets, such as "24G".
        card: a GPU by name.
        kv: how the cache keeps keys and values.
        method, group_size, bits: how a model that is not quantized yet would be.
    """

    source: Path
    vram: str | None = None
    ram: str | None = None
    card: str | None = None
    context: int | None = None
    batch: int = 1
    kv: KVFormat = "16"
    method: str = "nf4"
    group_size: int | None = None
    bits: float | None = None


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """An estimate, and what it was computed for.

    Attributes:
        place: the device or machine, in words.
        notes: what a reader should know about the figures.
    """

    estimate: Estimate
    place: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As a JSON document."""
        return {"place": self.place, "notes": list(self.notes), **self.estimate.to_dict()}


def answer(request: PlanRequest) -> PlanAnswer:
    """Plan for this machine, unless a card or larger sizes are given.

    Raises:
        QmixError: the source is damaged, a size is malformed, or the model cannot fit
            (ResourceError).
    """
    target = _target(request)
    model, dense = models_of(request)
    planned = plan(
        model,
        gpu=target.vram is not None,
        vram=target.vram,
        ram=target.ram,
        context=request.context,
        batch=request.batch,
        kv=request.kv,
    )
    return PlanAnswer(
        estimate=estimate(
            planned, target.rates(), partial(_in_bits, model.name, model.config), dense
        ),
        place=target.describe(),
        notes=target.notes,
    )


def rates_here() -> Rates:
    """What this machine's memories are read with: measured, or else from tables and assumed."""
    return _target(PlanRequest(source=Path())).rates()


def models_of(request: PlanRequest) -> tuple[StoredModel, StoredModel | None]:
    """The model that will run, and the dense one that it is still to be quantized from, if any.

    Raises:
        QmixError: the source is damaged or no Mixtral.
    """
    path = request.source
    if request.bits is not None and request.method != "auto":
        raise UsageError(f"--bits does not apply to --method {request.method}")
    if request.group_size is not None and request.method != "gptq":
        raise UsageError(f"--group-size does not apply to --method {request.method}")
    check_group_size(128 if request.group_size is None else request.group_size)
    budget = DEFAULT_BITS if request.bits is None else request.bits
    choices_for(budget)
    if not regular_file.exists(path):
        raise _no_source("no such directory or file", path)
    if path.is_dir() or is_gguf(path):
        refuse_raw(path)
        if is_gguf(path) or _has_weights(path):
            stored = StoredModel.of(read_metadata(path))
            if not stored.dense:
                return stored, None
            return _assumed(request, stored.name, stored.config, budget), stored
    file = path / "config.json" if path.is_dir() else path
    if not regular_file.exists(file):
        raise _no_source("neither a checkpoint nor a config.json there", path)
    config = MixtralConfig.from_dict(strict_json.read(file), where=str(file))
    if names.count(config) > _MOST_WEIGHTS:
        raise UnsupportedError(
            "too many weights to plan for",
            where=str(file),
            expected=f"at most {_MOST_WEIGHTS}",
            found=names.count(config),
        )
    name = file.resolve().parent.name
    dense = StoredModel.assume(name, config, DENSE)
    return _assumed(request, name, config, budget), dense


def _no_source(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        what, where=str(path), remedy="Give a checkpoint's folder, a GGUF file, or a config.json."
    )


def _has_weights(folder: Path) -> bool:
    return (folder / INDEX).is_file() or bool(visible(folder, "*.safetensors"))


def _assumed(request: PlanRequest, name: str, config: MixtralConfig, budget: float) -> StoredModel:
    """The model as it would be quantized."""
    if request.method == "auto":
        return _in_bits(name, config, budget)
    if request.method == "nf4":
        return StoredModel.assume(name, config, Scheme(kind="nf4"))
    scheme = Scheme(kind="int4", group_size=request.group_size or 128)
    return StoredModel.assume(name, config, scheme)


def _in_bits(name: str, config: MixtralConfig, bits: float) -> StoredModel:
    """The model as `--method auto` would quantize it if every weight deserved the same."""
    scheme, recipe = choices_for(bits).typical, alike(config, bits)
    return StoredModel.assume(name, config, scheme, recipe=recipe)


@dataclass(frozen=True, kw_only=True)
class _Target:
    """The machine that is planned for: this one, or one with another GPU.

    Attributes:
        vram: bytes of device memory; None: no GPU.
        ram: bytes of host memory; None: any amount.
        gpu: this machine's GPU, if it is the one planned for.
        card: the data sheet of the GPU planned for, if it is known.
        card_named: whether the user chose the card.
        measured: this machine's own rates, if it is the one planned for and was measured.
    """

    vram: int | None
    ram: int | None
    gpu: machine.Gpu | None
    card: Card | None
    card_named: bool
    measured: machine.Measured | None
    notes: tuple[str, ...]

    def rates(self) -> Rates:
        """This machine's measured rates if it is planned for; else tables and assumptions."""
        device, generation = _DEVICE, _PCIE_GENERATION
        if self.card is not None:
            share, sheet = f"{gpus.READ_SHARE:.0%}", f"{self.card.bandwidth / 1e9:,.0f}"
            source = f"{share} of the {self.card.name}'s data sheet, {sheet}"
            device, generation = Rate(self.card.read_bandwidth, source), self.card.pcie
        table = f"pinned memory over PCIe {generation} x16, table"
        interconnect = Rate(gpus.PCIE_BANDWIDTH[generation], table)
        host, disk = _HOST, _DISK
        if self.measured is not None:
            source = f"measured here on {self.measured.date[:10]}"
            host = Rate(self.measured.host_read, source)
            disk = _measured_rate(self.measured.disk_read, source, disk)
            device = _measured_rate(self.measured.device_copy, source, device)
            interconnect = _measured_rate(self.measured.interconnect, source, interconnect)
        return Rates(device=device, interconnect=interconnect, host=host, disk=disk)

    def describe(self) -> str:
        """The GPU or processor and its memory, in words."""
        memory = "any amount of host memory"
        if self.ram is not None:
            memory = f"{show(self.ram)} of host memory"
        if self.vram is None:
            model = machine.processor()
            return f"{model}, {counted(machine.cores(), 'core')}, {memory}, no GPU"
        if self.gpu is not None:
            name = self.gpu.name
        elif self.card is not None:
            name = self.card.name if self.card_named else f"a GPU as fast as an {self.card.name}"
        else:
            name = "a GPU"
        return f"{name}, {show(self.vram)} of device memory, {memory}"


def _measured_rate(bandwidth: float | None, source: str, default: Rate) -> Rate:
    return Rate(bandwidth, source) if bandwidth else default


def _target(request: PlanRequest) -> _Target:
    """The machine that a request means: this one, unless a card or larger sizes are given."""
    vram = None if request.vram is None else parse_size(request.vram, where="--vram", least=1 << 20)
    ram = None if request.ram is None else parse_size(request.ram, where="--ram", least=1 << 20)
    card = None if request.card is None else gpus.find(request.card)
    gpu = None if card is not None else next(iter(machine.gpus()), None)
    saved = machine.measurements(machine.key(gpu.name if gpu else None))
    if gpu is not None and vram is not None and vram > gpu.total:
        gpu = None  # another GPU is meant
    if vram is None:
        vram = card.vram if card else (gpu.free if gpu else None)
    elsewhere = card is not None or (vram is not None and gpu is None)
    if ram is None and not elsewhere:
        ram = machine.memory().available
    if card is None and vram is not None:
        card = gpus.known(gpu.name) if gpu else gpus.of_size(vram)
    notes = [saved.trouble] if saved.trouble else []
    if not elsewhere and saved.measured is None:
        notes.append(
            "nothing was measured here: qmix doctor --measure gives this machine's own rates"
        )
    if card is not None and not card.supported:
        notes.append(
            f"the 4-bit kernels need compute capability 8.0 and a {card.name} has "
            f"{card.capability[0]}.{card.capability[1]}: it would be far slower than the bound"
        )
    return _Target(
        vram=vram,
        ram=ram,
        gpu=gpu,
        card=card,
        card_named=request.card is not None,
        measured=None if elsewhere else saved.measured,
        notes=tuple(notes),
    )
