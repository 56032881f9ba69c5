"""How many experts fit each memory, as a function of the context, for one model and its budgets.

Pure arithmetic: no torch, no file, no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from qmix.errors import ResourceError
from qmix.planning import budget
from qmix.planning.budget import Item, MemoryBreakdown
from qmix.planning.byte_sizes import as_option, show
from qmix.planning.footprint import Footprint
from qmix.planning.roofline import StepCost
from qmix.planning.stored_model import StoredModel
from qmix.weights.blob import READ_BUFFERS


@dataclass(frozen=True)
class Split:
    """How experts are split across tiers.

    Attributes:
        slots: experts in device memory. host: in host memory.
        arena: whether they lie in arenas of blobs, because the fastest memory does not hold all.
    """

    slots: int
    host: int
    arena: bool


@dataclass(frozen=True)
class Fitting:
    """One model in its budgets.

    Attributes:
        footprint: the model's, on the device if `gpu`, else on the host.
        vram, ram: bytes; None is no limit.
        batch: B.
    """

    model: StoredModel
    footprint: Footprint
    gpu: bool
    vram: int | None
    ram: int | None
    batch: int

    @cached_property
    def _per_layer(self) -> int:
        return self.model.config.num_local_experts

    @property
    def _least_slots(self) -> int:
        """A prompt streams layers through a double buffer: two layers' experts."""
        return min(2 * self._per_layer, self.model.experts)

    @property
    def _least_host(self) -> int:
        """The experts of one token. With slots on a device those of a layer, so that one can be
        copied to it while another is read.
        """
        chosen = self.model.config.num_experts_per_tok
        has_slots = self.gpu and self.footprint.why_no_slots is None
        return min(self._per_layer if has_slots else chosen, self.model.experts)

    def split(self, context: int) -> Split | None:
        """As many experts as fit, the fastest memory first; None if the model does not fit."""
        return self._device_split(context) if self.gpu else self._host_split(context)

    def _host_split(self, context: int) -> Split | None:
        other, experts = MemoryBreakdown(self._host_items(context)).total, self.model.experts
        if self.ram is None or other + self.footprint.all_experts <= self.ram:
            return Split(0, experts, arena=False)
        host = (self.ram - other) // self.footprint.blob - READ_BUFFERS
        return Split(0, min(host, experts), arena=True) if host >= self._least_host else None

    def _device_split(self, context: int) -> Split | None:
        experts, blob = self.model.experts, self.footprint.blob
        on_device = MemoryBreakdown(self._device_items(context)).total
        on_host = MemoryBreakdown(self._host_items(context)).total
        if self.vram is None or on_device + self.footprint.all_experts <= self.vram:
            fits = self.ram is None or on_host <= self.ram
            return Split(experts, 0, arena=False) if fits else None
        slots = (self.vram - on_device) // blob
        in_slots = self.footprint.why_no_slots is None  # else the CPU multiplies them
        if slots < (self._least_slots if in_slots else 0):
            return None
        host = experts
        if self.ram is not None:
            room = self.ram - on_host
            # Without slots there are buffers even where all experts fit.
            if not in_slots or self._blobs(experts) > room:
                host = room // blob - READ_BUFFERS
        if host < self._least_host:
            return None
        return Split(min(slots, experts) if in_slots else 0, min(host, experts), arena=True)

    def _blobs(self, host: int) -> int:
        """Bytes of so many experts in host memory; which, is known of all of them only."""
        has_sizes = self.gpu and self.footprint.why_no_slots is None
        if has_sizes and host == self.model.experts:
            return self.footprint.all_blobs
        return host * self.footprint.blob

    def device_memory(self, context: int, split: Split) -> MemoryBreakdown:
        """What the plan takes of device memory; nothing without a device."""
        if not self.gpu:
            return MemoryBreakdown()
        whole, blob = self.footprint.all_experts, self.footprint.blob
        experts = Item("experts", split.slots * blob if split.arena else whole)
        return MemoryBreakdown((experts, *self._device_items(context)))

    def host_memory(self, context: int, split: Split) -> MemoryBreakdown:
        """What the plan takes of host memory."""
        items = self._host_items(context)
        if not split.arena:
            if self.gpu:
                return MemoryBreakdown(items)
            return MemoryBreakdown((Item("experts", self.footprint.all_experts), *items))
        blobs = [Item("experts", self._blobs(split.host))]
        if split.host < self.model.experts:
            blobs.append(Item("read buffers", READ_BUFFERS * self.footprint.blob))
        return MemoryBreakdown((*blobs, *items))

    def _device_items(self, context: int) -> tuple[Item, ...]:
        if not self.gpu:
            return ()
        return budget.device_items(self.model, self.footprint, context, self.batch)

    def _host_items(self, context: int) -> tuple[Item, ...]:
        if self.gpu:
            return budget.host_items_beside_device(self.model, self.footprint)
        return budget.host_items(self.model, self.footprint, context, self.batch)

    def step_cost(self, split: Split) -> StepCost:
        """What a decode step reads, with an empty cache.

        B rows that choose independently activate E (1 - (1 - k / E)^B) distinct experts a layer.
        """
        config, experts = self.model.config, self.model.experts
        not_chosen = (1 - config.num_experts_per_tok / self._per_layer) ** self.batch
        fastest = split.slots if self.gpu else split.host
        return StepCost(
            dense=self.footprint.read_by_every_token,
            activations=config.num_hidden_layers * self._per_layer * (1 - not_chosen),
            expert=self.footprint.all_experts / experts,
            hit=fastest / experts,
            cold=0.0 if self.gpu and not split.arena else 1 - split.host / experts,
            layers=config.num_hidden_layers,
        )

    def largest_context(self, accept: Callable[[Split], bool] = lambda split: True) -> int:
        """The longest context that fits with a split that is accepted; 0 if none does."""
        low, high = 0, self.model.config.max_position_embeddings
        while low < high:
            middle = (low + high + 1) // 2
            split = self.split(middle)
            if split is not None and accept(split):
                low = middle
            else:
                high = middle - 1
        return low

    def _least_budgets(self, context: int) -> tuple[int, int]:
        """The smallest budgets, of the device and of the host, that this context fits."""
        blob, whole = self.footprint.blob, self.footprint.all_experts
        on_host = MemoryBreakdown(self._host_items(context)).total
        if not self.gpu:
            return 0, on_host + min((self._least_host + READ_BUFFERS) * blob, whole)
        on_device = MemoryBreakdown(self._device_items(context)).total
        if self.footprint.why_no_slots is not None:
            return on_device, on_host + (self._least_host + READ_BUFFERS) * blob
        vram = on_device + min(self._least_slots * blob, whole)
        if self.vram is not None and self.vram >= on_device + whole:
            return vram, on_host
        buffers = READ_BUFFERS if self._least_host < self.model.experts else 0
        return vram, on_host + (self._least_host + buffers) * blob

    def refusal(self, context: int) -> ResourceError:
        """The error for a context that does not fit: what is short, and what would fit."""
        vram, ram = self._least_budgets(context)
        device_is_short = self.vram is not None and self.vram < vram
        name, place = ("vram", "device") if device_is_short else ("ram", "host")
        given, needed = (self.vram, vram) if device_is_short else (self.ram, ram)
        longest = self.largest_context()
        shorter = f", or --ctx {longest}" if longest else "; a shorter context does not help"
        remedy = f"What would fit: --{name} {as_option(needed)}{shorter}."
        return ResourceError(
            f"too little {place} memory for a context of {context}",
            where=name,
            expected=f"at least {show(needed)}",
            found=show(given or 0),
            remedy=remedy,
        )
