"""What layers, loader and statistics know of a store of experts, wherever it keeps them.

Shape letters: T tokens, k chosen experts a token, D hidden width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from qmix.errors import UnsupportedError, UsageError
from qmix.experts.layer_experts import Experts
from qmix.experts.residency import Counts
from qmix.kernels import Routes
from qmix.weights.expert import Expert


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a store has done since it was made; bytes are exact.

    Attributes:
        device_slots: experts that fit the device's memory. host: in host memory. disk: in the file only.
        expert_bytes: of one blob.
        tokens: decode steps. hits, misses: experts they met in the fastest tier, and not there.
        failures: copies or reads that failed.
        interconnect_bytes: copied to the device for decode steps. in_place_bytes: read over PCIe where
            they lie. disk_bytes: read from the file for decode steps.
        prefill_interconnect_bytes, prefill_disk_bytes: the same for prompts.
        unpinned_bytes: of host memory that should have been pinned and could not be.
        path: how a miss is served: "disk", "zero-copy", "copy" or "cpu".
        path_switches: how often it changed.
    """

    device_slots: int
    host: int
    disk: int
    expert_bytes: int
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    failures: int = 0
    interconnect_bytes: int = 0
    in_place_bytes: int = 0
    disk_bytes: int = 0
    prefill_interconnect_bytes: int = 0
    prefill_disk_bytes: int = 0
    unpinned_bytes: int = 0
    path: str = "disk"
    path_switches: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among the decode steps' activations; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)

    def per_token(self, nbytes: int) -> float:
        """So many bytes a decode step."""
        return nbytes / max(self.tokens, 1)

    def since(self, earlier: "Statistics") -> "Statistics":
        """What was counted after `earlier`; sizes and path as they are now."""
        counted = (
            *(
                "tokens",
                "hits",
                "misses",
                "failures",
                "interconnect_bytes",
                "in_place_bytes",
                "disk_bytes",
            ),
            *("prefill_interconnect_bytes", "prefill_disk_bytes", "path_switches"),
        )
        now, then = asdict(self), asdict(earlier)
        return Statistics(**{**now, **{name: now[name] - then[name] for name in counted}})

    def to_dict(self) -> dict[str, Any]:
        """As a JSON document, with the figures a token."""
        moved = {
            name: self.per_token(getattr(self, name))
            for name in ("interconnect_bytes", "in_place_bytes", "disk_bytes")
        }
        return {
            **asdict(self),
            "hit_rate": self.hit_rate,
            **{f"{name}_per_token": nbytes for name, nbytes in moved.items()},
        }

    def __str__(self) -> str:
        tiers = [
            (self.device_slots, "on the device"),
            (self.host, "in RAM"),
            (self.disk, "on disk"),
        ]
        held = ", ".join(f"{count} {where}" for count, where in tiers if count)
        moved = [
            f"{self.per_token(nbytes) / 1e9:.2f} GB/token {how}"
            for nbytes, how in (
                (self.interconnect_bytes + self.in_place_bytes, "over PCIe"),
                (self.disk_bytes, "from disk"),
            )
            if nbytes
        ]
        text = f"experts: {held} · hit rate {100 * self.hit_rate:.0f} %"
        text += "".join(f" · {part}" for part in moved) + f" · misses by {self.path}"
        if self.unpinned_bytes:
            text += f" · {self.unpinned_bytes / 2**30:.1f} GiB not pinned"
        if self.failures:
            text += f" · {self.failures} copies failed"
        return text


class Store(ABC):
    """Keeps a model's experts where they fit."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """What it has done so far. Asked for between steps."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way and let threads and registrations go."""

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "an offloaded model is not copied or pickled",
            remedy="Load it again, or write it with save_pretrained.",
        )


class StoredExperts(Experts):
    """One layer's experts in a store, each indexed as it can be described and saved at rest."""

    store: Store

    def __init__(self, at_rest: Sequence[Expert]) -> None:
        self._at_rest = at_rest

    def __len__(self) -> int:
        return len(self._at_rest)

    def expert(self, index: int) -> Expert:
        return self._at_rest[index]

    def forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor:
        """See Experts.forward.

        Raises:
            UsageError: gradients are asked for.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                "an offloaded model computes no gradients",
                remedy="Load it without vram= and ram= to train, or use torch.no_grad().",
            )
        return self._forward(x, routes, act)

    @abstractmethod
    def _forward(self, x: Tensor, routes: Routes, act: Callable[[Tensor], Tensor]) -> Tensor: ...


def chosen_ids(routes: Routes) -> list[int]:
    """The experts that any token chose, ascending. The host waits for the router."""
    return sorted(set(routes.ids.flatten().tolist()))


@dataclass
class MovedBytes:
    """Bytes that a store has moved, beside what its Residency counts."""

    interconnect: int = 0
    in_place: int = 0
    disk: int = 0
    prefill_interconnect: int = 0
    prefill_disk: int = 0

    def fields(self, counts: Counts, failures: int = 0) -> dict[str, int]:
        """The counted fields of Statistics; `failures` beside those that are counted."""
        return {
            "tokens": counts.tokens,
            "hits": counts.hits,
            "misses": counts.misses,
            "failures": counts.failures + failures,
            "interconnect_bytes": self.interconnect,
            "in_place_bytes": self.in_place,
            "disk_bytes": self.disk,
            "prefill_interconnect_bytes": self.prefill_interconnect,
            "prefill_disk_bytes": self.prefill_disk,
        }
