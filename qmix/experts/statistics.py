"""What a store of experts has done: hits, misses and bytes, as a line, as JSON, and as differences.

Knows no store.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qmix.experts.residency import Counts
from qmix.quantities import counted

_PER_TOKEN = ("interconnect_bytes", "in_place_bytes", "disk_bytes")
_COUNTERS = (
    *("tokens", "hits", "misses", "ahead", "dropped", "failures", "path_switches"),
    *(*_PER_TOKEN, "prefill_interconnect_bytes", "prefill_disk_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a store has done since it was made; bytes are exact.

    Attributes:
        device_slots: experts that fit device memory. host: in host memory. disk: only in the file.
        expert_bytes: of one blob.
        tokens: decode steps. hits, misses: the experts that these steps activated, by whether they
            were in the fastest tier.
        ahead: misses whose read had begun before the router had chosen them. dropped: reads that
            had begun so for experts that it did not choose; their bytes are not counted.
        failures: copies or reads that failed.
        interconnect_bytes: copied to the device for decode steps. in_place_bytes: read over PCIe
            from host memory. disk_bytes: read from the file for decode steps.
        prefill_interconnect_bytes, prefill_disk_bytes: the same for prompts.
        unpinned_bytes: of host memory that should have been pinned and could not be.
        path: how a miss is served: "disk", "zero-copy", "copy" or "cpu".
        path_switches: how often the path has changed.
    """

    device_slots: int
    host: int
    disk: int
    expert_bytes: int
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    ahead: int = 0
    dropped: int = 0
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
        """The share of activations that were hits; 0 before the first."""
        return self.hits / max(self.hits + self.misses, 1)

    def per_token(self, nbytes: int) -> float:
        """Bytes divided by the decode steps."""
        return nbytes / max(self.tokens, 1)

    def since(self, earlier: "Statistics") -> "Statistics":
        """What was counted after `earlier`, with today's sizes and path."""
        now, then = asdict(self), asdict(earlier)
        return Statistics(**{**now, **{name: now[name] - then[name] for name in _COUNTERS}})

    @classmethod
    def total(cls, parts: Sequence["Statistics"]) -> "Statistics":
        """The counters of several stretches together, with the sizes and path of the last."""
        counters = {name: sum(getattr(part, name) for part in parts) for name in _COUNTERS}
        return cls(**{**asdict(parts[-1]), **counters})

    def to_dict(self) -> dict[str, Any]:
        """The statistics as a JSON document, with bytes per token."""
        per_token = {
            f"{name}_per_token": self.per_token(getattr(self, name)) for name in _PER_TOKEN
        }
        return {**asdict(self), "hit_rate": self.hit_rate, **per_token}

    def __str__(self) -> str:
        tiers = (
            (self.device_slots, "on the device"),
            (self.host, "in RAM"),
            (self.disk, "on disk"),
        )
        moved = (
            (self.interconnect_bytes + self.in_place_bytes, "over PCIe"),
            (self.disk_bytes, "from disk"),
        )
        parts = [
            "experts: " + ", ".join(f"{count} {where}" for count, where in tiers if count),
            f"hit rate {100 * self.hit_rate:.0f} %",
            *(f"{self.per_token(size) / 1e9:.2f} GB/token {how}" for size, how in moved if size),
            f"misses by {self.path}",
        ]
        if self.unpinned_bytes:
            parts.append(f"{self.unpinned_bytes / 2**30:.1f} GiB not pinned")
        if self.failures:
            parts.append(f"{counted(self.failures, 'copy')} failed")
        return " · ".join(parts)


@dataclass
class MovedBytes:
    """Bytes that a store has moved, beside what its Residency counts."""

    interconnect: int = 0
    in_place: int = 0
    disk: int = 0
    prefill_interconnect: int = 0
    prefill_disk: int = 0

    def fields(self, counts: Counts, failures: int = 0) -> dict[str, int]:
        """The counters of Statistics.

        Args:
            failures: those that `counts` does not include.
        """
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
