"""How fast a token can be at best: bytes over bandwidths, as reference formulas have it.

T of one decode step, batch 1, for a model whose experts lie in several tiers:
    all in device memory     T = (D + A S) / B_device
    misses over PCIe         T = (D + A S) / B_device + m A S / B_pcie
    misses on the CPU        T = (D + h A S) / B_device + m A S / B_host + L t
    experts on the disk      + f A S / B_disk
    no device                T = (D + A S) / B_host + f A S / B_disk
A expert activations a token, S bytes an expert, D other bytes read, h the share of activations that hit the
fastest tier, m = 1 - h, f the share that only the disk holds, L layers, t what a layer waits for the host. Without locality h is the
share of experts that the tier holds, which any policy reaches. Knows no torch and no model.
"""

from dataclasses import dataclass
from typing import Literal

Path = Literal["resident", "interconnect", "cpu", "host", "host and disk"]

# What is expected of a bound until it has been measured: the goals that this project set itself.
# llama.cpp's static split reaches 0.54 to 0.78 of its own, a tuned resident MoE decode 0.51.
SHARE: dict[Path, float] = {
    "resident": 0.60,
    "interconnect": 0.80,
    "cpu": 0.70,
    "host": 0.70,
    "host and disk": 0.70,
}


@dataclass(frozen=True)
class Rate:
    """Bytes a second, and where the figure is from."""

    bandwidth: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What can be read a second: device memory, the interconnect to it, host memory by the CPU, the disk."""

    device: Rate
    interconnect: Rate
    host: Rate
    disk: Rate


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The bytes of one decode step.

    Attributes:
        dense: bytes that every token reads: attention, router, norms, head (D).
        activations: expert activations (A). expert: bytes of one (S).
        hit: share of activations that the fastest tier holds (h). cold: that only the disk holds (f).
        layers: L.
        wait_s: what a layer waits for the host's answer (t); 0 for a bound.
    """

    dense: float
    activations: float
    expert: float
    hit: float
    layers: int
    cold: float = 0.0
    wait_s: float = 0.0

    @property
    def missed(self) -> float:
        """Bytes of experts that come from the next tier: m A S."""
        return (1 - self.hit) * self.activations * self.expert

    def seconds(self, path: Path, rates: Rates) -> float:
        """The least time of the step."""
        active = self.dense + self.activations * self.expert
        read = self.cold * self.activations * self.expert / rates.disk.bandwidth
        match path:
            case "resident":
                return active / rates.device.bandwidth
            case "interconnect":
                return (
                    active / rates.device.bandwidth
                    + self.missed / rates.interconnect.bandwidth
                    + read
                )
            case "cpu":
                on_device = (active - self.missed) / rates.device.bandwidth
                waiting = self.layers * self.wait_s
                return on_device + self.missed / rates.host.bandwidth + waiting + read
            case "host" | "host and disk":
                return active / rates.host.bandwidth + read
