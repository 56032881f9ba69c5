"""What fits where: how many experts lie in device memory, in host memory and in the file.

Pure arithmetic over `footprint`: no torch, no file, no clock. What a plan promises is its bills, and
that they stay within the budgets. Shape letters: B rows, E experts a layer, k chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qmix.errors import ResourceError, UsageError
from qmix.formats.metadata import CheckpointMetadata
from qmix.planning import budget, machine, roofline
from qmix.planning.budget import READ_BUFFERS, Item, MemoryBreakdown
from qmix.planning.byte_sizes import show
from qmix.planning.footprint import Footprint, StoredModel

CONTEXT = 4096  # positions that are planned for where nobody says how many


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a model's experts lie, and what that takes.

    With a GPU either all experts lie in device memory and none elsewhere (`resident`), or every one
    lies in host memory or in the file, and `slots` of them have a copy in device memory. Without one
    `slots` is 0, `host` lie in memory and the rest is read when it is needed.

    Attributes:
        gpu: whether a device is planned for.
        vram, ram: the budgets in bytes; None is no limit.
        context, batch: positions a row, and rows.
        experts: of all layers. slots: in device memory. host: in host memory. disk: in the file only.
        expert_bytes: what an arena keeps for one; 0 if nothing is kept in arenas.
        device_memory, host_memory: of each memory; the device's is empty without one.
        largest_context: that fits these budgets. resident_context: with every expert in the fastest
            tier; 0 if none does.
        step_cost: what a token reads, for `bounds`, with an empty cache.
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
    step_cost: roofline.StepCost

    @property
    def resident(self) -> bool:
        """Whether all experts lie in the fastest memory."""
        return self.experts == (self.slots if self.gpu else self.host)

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "gpu": self.gpu,
            "vram": self.vram,
            "ram": self.ram,
            "context": self.context,
            "batch": self.batch,
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
) -> Plan:
    """Fit a model into its budgets.

    Args:
        source: a checkpoint's headers, or a model whose scheme is assumed.
        gpu: plan for a device; otherwise host memory plays its part.
        vram, ram: bytes that may be used in all, what the process has anyway included; None is no
            limit.
        context: positions a row; default: 4096, or the model's.
        dtype: of activations and dense weights; default: the checkpoint's.

    Raises:
        ResourceError: it cannot fit; the message says what would.
        UsageError: a context or batch out of range.
    """
    model = source if isinstance(source, StoredModel) else StoredModel.of(source, dtype)
    positions = model.config.max_position_embeddings
    if context is not None and not 1 <= context <= positions:
        raise UsageError(
            "out of range", where="context", expected=f"1 to {positions}", found=context
        )
    if not 1 <= batch <= 1 << 16:
        raise UsageError("out of range", where="batch", expected="1 to 65536", found=batch)
    asked = min(CONTEXT, positions) if context is None else context
    fitting = _Fitting(model, gpu, vram, ram, batch)
    split = fitting.split(asked)
    if split is None:
        raise fitting.refusal(asked)
    return Plan(
        model=model,
        gpu=gpu,
        vram=vram,
        ram=ram,
        context=asked,
        batch=batch,
        experts=model.experts,
        slots=split.slots,
        host=split.host,
        disk=0 if gpu and split.slots == model.experts else model.experts - split.host,
        expert_bytes=fitting.blob if split.arena else 0,
        device_memory=fitting.device_memory(asked, split),
        host_memory=fitting.host_memory(asked, split),
        largest_context=fitting.largest(lambda one: one is not None),
        resident_context=fitting.largest(lambda one: one is not None and not one.arena),
        step_cost=fitting.step_cost(split),
    )


def check_memory(
    planned: Plan | MemoryBreakdown, *, ram_free: int | None = None, vram_free: int | None = None
) -> None:
    """Refuse what the machine has no room for now, before anything is allocated.

    Args:
        planned: a plan, or the bill of host memory.
        ram_free: bytes; default: what the system and its control groups leave.
        vram_free: bytes of the device; None does not look at it.

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
                "Give a smaller vram, so that experts stay in host memory, or close what holds it."
            )
            raise _short("device memory", needed, vram_free, remedy)


def _short(what: str, needed: int, free: int, remedy: str) -> ResourceError:
    return ResourceError(
        f"not enough free {what}",
        expected=f"{show(needed)}",
        found=f"{show(free)} free",
        remedy=remedy,
    )


def _host_remedy(planned: Plan | MemoryBreakdown) -> str:
    if isinstance(planned, MemoryBreakdown):
        return "Close other programs, or use a machine with more memory."
    if planned.gpu:
        return "Give a smaller ram: experts that do not fit are read from the file."
    return "Give a ram budget: experts that do not fit it are read from the file when needed."


@dataclass(frozen=True)
class _Split:
    """How the experts are dealt; `arena`: in blobs, not all in the fastest memory."""

    slots: int
    host: int
    arena: bool


@dataclass(frozen=True)
class _Fitting:
    """One model in one pair of budgets; everything as a function of the context."""

    model: StoredModel
    gpu: bool
    vram: int | None
    ram: int | None
    batch: int

    @cached_property
    def footprint(self) -> Footprint:
        return self.model.on_device if self.gpu else self.model.on_host

    @property
    def blob(self) -> int:
        return self.footprint.blob

    @cached_property
    def per_layer(self) -> int:
        return self.model.config.num_local_experts

    @property
    def least_slots(self) -> int:
        """A prompt streams layers through a double buffer: two layers' experts."""
        return min(2 * self.per_layer, self.model.experts)

    @property
    def least_host(self) -> int:
        """One token's experts; with a device a layer's, so that one can be sent while one is read."""
        chosen = self.model.config.num_experts_per_tok
        return min(self.per_layer if self.gpu else chosen, self.model.experts)

    def split(self, context: int) -> _Split | None:
        """The most experts in the fastest memory that the budgets allow; None if it does not fit."""
        every, whole = self.model.experts, self.footprint.whole
        fixed, beside = _total(self._device_items(context)), _total(self._host_items(context))
        if not self.gpu:
            if self.ram is None or beside + whole <= self.ram:
                return _Split(0, every, arena=False)
            room = (self.ram - beside) // self.blob - READ_BUFFERS
            return _Split(0, min(room, every), arena=True) if room >= self.least_host else None
        if self.vram is None or fixed + whole <= self.vram:
            fits = self.ram is None or beside <= self.ram
            return _Split(every, 0, arena=False) if fits else None
        slots = (self.vram - fixed) // self.blob
        if slots < self.least_slots or self.footprint.unpacked is not None:
            return None
        room = every if self.ram is None else (self.ram - beside) // self.blob
        if room < every:
            room -= READ_BUFFERS
        if room < self.least_host:
            return None
        return _Split(min(slots, every), min(room, every), arena=True)

    def device_memory(self, context: int, split: _Split) -> MemoryBreakdown:
        if not self.gpu:
            return MemoryBreakdown()
        experts = split.slots * self.blob if split.arena else self.footprint.whole
        return MemoryBreakdown((Item("experts", experts), *self._device_items(context)))

    def host_memory(self, context: int, split: _Split) -> MemoryBreakdown:
        items = self._host_items(context)
        if not split.arena:
            if self.gpu:
                return MemoryBreakdown(items)
            return MemoryBreakdown((Item("experts", self.footprint.whole), *items))
        held = [Item("experts", split.host * self.blob)]
        if split.host < self.model.experts:
            held.append(Item("read buffers", READ_BUFFERS * self.blob))
        return MemoryBreakdown((*held, *items))

    def _device_items(self, context: int) -> tuple[Item, ...]:
        if not self.gpu:
            return ()
        return budget.device_items(self.model, self.footprint, context, self.batch)

    def _host_items(self, context: int) -> tuple[Item, ...]:
        if self.gpu:
            return budget.host_items_beside_device(self.model, self.footprint)
        return budget.host_items(self.model, self.footprint, context, self.batch)

    def step_cost(self, split: _Split) -> roofline.StepCost:
        """Distinct experts of B rows are E (1 - (1 - k/E)^B) a layer if rows choose independently."""
        config, every = self.model.config, self.model.experts
        missed = (1 - config.num_experts_per_tok / self.per_layer) ** self.batch
        held = split.slots if self.gpu else split.host
        return roofline.StepCost(
            dense=self.footprint.reads,
            activations=config.num_hidden_layers * self.per_layer * (1 - missed),
            expert=self.footprint.whole / every,
            hit=held / every,
            cold=0.0 if self.gpu and not split.arena else 1 - split.host / every,
            layers=config.num_hidden_layers,
        )

    def largest(self, fits: Callable[[_Split | None], bool]) -> int:
        """The longest context whose split passes; 0 if none does."""
        low, high = 0, self.model.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            if fits(self.split(middle)):
                low = middle
            else:
                high = middle - 1
        return low

    def least(self, context: int) -> tuple[int, int]:
        """The smallest device and host budgets that this context fits."""
        beside = _total(self._host_items(context))
        if not self.gpu:
            tiered = beside + (self.least_host + READ_BUFFERS) * self.blob
            return 0, min(tiered, beside + self.footprint.whole)
        fixed, whole = _total(self._device_items(context)), self.footprint.whole
        if self.footprint.unpacked is not None:
            return fixed + whole, beside
        vram = min(fixed + self.least_slots * self.blob, fixed + whole)
        if self.vram is not None and self.vram >= fixed + whole:
            return vram, beside
        room = self.least_host
        return vram, beside + (
            room + (READ_BUFFERS if room < self.model.experts else 0)
        ) * self.blob

    def refusal(self, context: int) -> ResourceError:
        """What does not fit, and what would."""
        vram, ram = self.least(context)
        short = self.vram is not None and self.vram < vram
        budget, needed = (self.vram, vram) if short else (self.ram, ram)
        longest = self.largest(lambda one: one is not None)
        shorter = f", or --ctx {longest}" if longest else "; a shorter context does not help"
        name, what = ("vram", "device") if short else ("ram", "host")
        other = ""
        if short and self.footprint.unpacked is not None:
            other = f" Experts cannot stay in host memory: {self.footprint.unpacked}."
        return ResourceError(
            f"too little {what} memory for a context of {context}",
            where=name,
            expected=f"at least {show(needed)}",
            found=show(budget or 0),
            remedy=f"What would fit: --{name} {_rounded_up(needed)}{shorter}.{other}",
        )


def _total(items: tuple[Item, ...]) -> int:
    return sum(item.nbytes for item in items)


def _rounded_up(nbytes: int) -> str:
    """As an option: the next tenth of a GiB, or MiB if it is small."""
    unit, name = (1 << 30, "G") if nbytes >= 1 << 30 else (1 << 20, "M")
    return f"{-(-nbytes * 10 // unit) / 10:.1f}{name}"
