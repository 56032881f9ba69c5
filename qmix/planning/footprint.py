"""The bytes of a model's parts on the host, in the standard layouts.

`device_footprint` counts them on a GPU. Knows no torch and no tensors.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from qmix.formats.names import TensorKind
from qmix.planning.byte_sizes import show
from qmix.planning.stored_model import StoredModel
from qmix.weights.blob import PAGE_BYTES, aligned, expert_bytes


@dataclass(frozen=True)
class Widening:
    """Codes that take more bits on a GPU than where they are stored.

    Attributes:
        bits: pairs of the bits of a code as it is stored, and on a GPU, in ascending order.
        nbytes: what that takes more.
    """

    bits: tuple[tuple[int, int], ...]
    nbytes: int

    def __str__(self) -> str:
        parts = []
        for wide in sorted({wide for _, wide in self.bits}):
            stored = [str(narrow) for narrow, to in self.bits if to == wide]
            parts.append(f"codes of {' and '.join(stored)} bits take {wide} on a GPU")
        return f"{', '.join(parts)}: {show(self.nbytes)} more than as they are stored"


@dataclass(frozen=True)
class Footprint:
    """Bytes of a model's parts where it runs.

    Attributes:
        experts: of each expert, by layer * E + expert.
        blob: what an arena keeps for the largest expert, in whole pages.
        kinds: of the other weights, by kind.
        host_bytes: of what stays on the host beside a model on a GPU: the scales as they were read.
        why_no_slots: why slots of a GPU's memory cannot hold the experts; None if they can, and
            without a GPU.
        widened: what codes of few bits take more there; None if none do.
    """

    experts: tuple[int, ...]
    blob: int
    kinds: Mapping[TensorKind, int]
    host_bytes: int = 0
    why_no_slots: str | None = None
    widened: Widening | None = None

    @cached_property
    def all_experts(self) -> int:
        """Bytes of all experts."""
        return sum(self.experts)

    @cached_property
    def all_blobs(self) -> int:
        """Bytes of an arena of all packed experts, each on pages of its own."""
        return sum(aligned(size, PAGE_BYTES) for size in self.experts)

    @property
    def total(self) -> int:
        """Bytes of all weights."""
        return self.all_experts + sum(self.kinds.values())

    @cached_property
    def read_by_every_token(self) -> int:
        """Bytes that every token reads besides experts; of the embedding it reads one row only."""
        return sum(size for kind, size in self.kinds.items() if kind != "embedding")


def on_host(model: StoredModel) -> Footprint:
    """The footprint in host memory, in the standard layouts."""
    kinds: dict[TensorKind, int] = defaultdict(int)
    for weight in model.weights:
        if weight.tensor.kind != "expert":
            kinds[weight.tensor.kind] += weight.memory_bytes(model.item)
    experts, blobs = [], []
    for weights in model.expert_weights:
        experts.append(sum(weight.memory_bytes(model.item) for weight in weights))
        blobs.append(expert_bytes(weight.blob_bytes(model.item) for weight in weights))
    return Footprint(tuple(experts), aligned(max(blobs), PAGE_BYTES), with_tied_head(model, kinds))


def with_tied_head(model: StoredModel, kinds: dict[TensorKind, int]) -> dict[TensorKind, int]:
    """Bytes by kind; an embedding that is tied to the head counts as the head, which is read."""
    if model.config.tie_word_embeddings:
        kinds["head"] = kinds.pop("embedding")
    return dict(kinds)
