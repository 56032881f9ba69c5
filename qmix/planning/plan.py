"""What fits where: how many experts lie in device memory, in host memory and in the file.

A plan promises its memory breakdowns, and that they stay within the budgets. It is arithmetic on
shapes: no torch, no file, no clock. Only `check_memory` looks at the machine.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from qmix.errors import ResourceError, UsageError
from qmix.formats.metadata import CheckpointMetadata
from qmix.kv_format import KVFormat, check_width
from qmix.planning import machine
from qmix.planning.budget import MemoryBreakdown
from qmix.planning.byte_sizes import show
from qmix.planning.device_footprint import on_device
from qmix.planning.fitting import Fitting
from qmix.planning.footprint import on_host
from qmix.planning.roofline import StepCost
from qmix.planning.stored_model import StoredModel

CONTEXT = 4096  # positions that are planned for by default


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a model's experts lie, and what that takes.

    With a GPU either all experts lie in device memory and none elsewhere (`resident`), or every one
    lies in host memory or in the file, and `slots` of them have a copy in device memory. Without a
    GPU `slots` is 0, `host` experts lie in memory, and the others are read when they are needed.

    Attributes:
        gpu: whether a device is planned for.
        vram, ram: the budgets in bytes; None is no limit.
        context, batch: positions a row, and rows.
        experts: in all layers. slots: in device memory. host: in host memory. disk: only in the
            file.
        expert_bytes: what an arena keeps for one expert; 0 if there are no arenas.
        device_memory, host_memory: what the plan takes of each; device memory is empty without a
            GPU.
        largest_context: the longest that fits these budgets. resident_context: the longest with
            every expert in the fastest tier; 0 if none does.
        step_cost: what a decode step reads, with an empty cache.
        fitting: what the plan was made with.
    """

    model: StoredModel
    gpu: bool
    vram: int | None
    ram: int | None
    context: int
    batch: int
    experts: int
    slots: int
    host: int
    disk: int
    expert_bytes: int
    device_memory: MemoryBreakdown
    host_memory: MemoryBreakdown
    largest_context: int
    resident_context: int
    step_cost: StepCost
    fitting: Fitting = field(repr=False)

    @property
    def resident(self) -> bool:
        """Whether all experts lie in the fastest memory."""
        return self.experts == (self.slots if self.gpu else self.host)

    @property
    def widened_bytes(self) -> int:
        """What codes take more on a GPU than as they are stored."""
        widened = self.fitting.footprint.widened
        return 0 if widened is None else widened.nbytes

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON document."""
        return {
            "gpu": self.gpu,
            "vram": self.vram,
            "ram": self.ram,
            "context": self.context,
            "batch": self.batch,
            "kv": self.model.kv,
            "resident": self.resident,
            "experts": {
                "all": self.experts,
                "device": self.slots,
                "host": self.host,
                "disk": self.disk,
                "bytes": self.expert_bytes,
            },
            "device": self.device_memory.to_dict(),
            "host": self.host_memory.to_dict(),
            "widened_bytes": self.widened_bytes,
            "device_bytes": self.device_memory.total,
            "host_bytes": self.host_memory.total,
            "largest_context": self.largest_context,
            "resident_context": self.resident_context,
        }


def plan(
    source: StoredModel | CheckpointMetadata,
    *,
    gpu: bool,
    vram: int | None = None,
    ram: int | None = None,
    context: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
    kv: KVFormat | None = None,
) -> Plan:
    """Fit a model into its budgets.

    Args:
        source: a checkpoint's headers, or a model whose scheme is assumed.
        gpu: plan for a device; otherwise the model runs in host memory.
        vram, ram: bytes that may be used in all, including what the process takes without a model;
            None is no limit.
        context: positions a row; default: 4096, or the model's if it has fewer.
        dtype: of activations and dense weights; default: the checkpoint's.
        kv: how the cache keeps keys and values; default: as the source says, or "16".

    Raises:
        ResourceError: it cannot fit; the message says what would.
        UsageError: the context or the batch is out of range, or the heads do not fit `kv`.
    """
    model = source if isinstance(source, StoredModel) else StoredModel.of(source, dtype)
    model = model if kv is None else replace(model, kv=kv)
    check_width(model.kv, model.config.head_dim)
    positions = model.config.max_position_embeddings
    if context is not None and not 1 <= context <= positions:
        raise UsageError(
            "out of range", where="context", expected=f"1 to {positions}", found=context
        )
    if not 1 <= batch <= 1 << 16:
        raise UsageError("out of range", where="batch", expected="1 to 65536", found=batch)
    footprint = on_device(model) if gpu else on_host(model)
    fitting = Fitting(model, footprint, gpu, vram, ram, batch)
    return fitted(fitting, min(CONTEXT, positions) if context is None else context)


def fitted(fitting: Fitting, context: int) -> Plan:
    """The plan for a model in its budgets.

    Raises:
        ResourceError: it cannot fit; the message says what would.
    """
    split = fitting.split(context)
    if split is None:
        raise fitting.refusal(context)
    experts = fitting.model.experts
    return Plan(
        model=fitting.model,
        gpu=fitting.gpu,
        vram=fitting.vram,
        ram=fitting.ram,
        context=context,
        batch=fitting.batch,
        experts=experts,
        slots=split.slots,
        host=split.host,
        disk=0 if fitting.gpu and split.slots == experts else experts - split.host,
        expert_bytes=fitting.footprint.blob if split.arena else 0,
        device_memory=fitting.device_memory(context, split),
        host_memory=fitting.host_memory(context, split),
        largest_context=fitting.largest_context(),
        resident_context=fitting.largest_context(lambda split: not split.arena),
        step_cost=fitting.step_cost(split),
        fitting=fitting,
    )


def check_memory(
    planned: Plan | MemoryBreakdown, *, ram_free: int | None = None, vram_free: int | None = None
) -> None:
    """Refuse what does not fit the memory that is free now, before anything is allocated.

    Args:
        planned: a plan, or what a command takes of host memory.
        ram_free: bytes; default: what the system and its control groups leave.
        vram_free: bytes of the device; None does not check it.

    Raises:
        ResourceError: with what is needed, what is free, and what to do.
    """
    host = planned if isinstance(planned, MemoryBreakdown) else planned.host_memory
    free = machine.memory().available if ram_free is None else ram_free
    if host.loaded > free:
        raise _short("host memory", host.loaded, free, _host_remedy(planned))
    if isinstance(planned, Plan) and vram_free is not None:
        needed = planned.device_memory.loaded
        if needed > vram_free:
            remedy = (
                "Give a smaller vram, so that experts stay in host memory, or close the programs "
                "that use the GPU."
            )
            raise _short("device memory", needed, vram_free, remedy)


def _short(memory: str, needed: int, free: int, remedy: str) -> ResourceError:
    return ResourceError(
        f"not enough free {memory}",
        expected=show(needed),
        found=f"{show(free)} free",
        remedy=remedy,
    )


def _host_remedy(planned: Plan | MemoryBreakdown) -> str:
    if isinstance(planned, MemoryBreakdown):
        return "Close other programs, or use a machine with more memory."
    if planned.gpu:
        return "Give a smaller ram: experts that do not fit are read from the file."
    return "Give a ram budget: experts that do not fit it are read from the file when needed."
