"""How fast a decode step can be at best: bytes divided by bandwidths.

T of one step for a model whose experts are in several tiers:
    all in device memory     T = (D + A S) / B_device
    misses over PCIe         T = (D + A S) / B_device + m A S / B_pcie
    misses on the CPU        T = (D + h A S) / B_device + m A S / B_host + L t
    experts on the disk      + f A S / B_disk
    no device                T = (D + A S) / B_host + f A S / B_disk
A expert activations a step, S bytes an expert, D other bytes that are read, h the share of
activations that hit the fastest tier, m = 1 - h, f the share that only the disk holds, L layers, t
the time that a layer waits for the host. Without locality h is the share of experts in the fastest
tier, whatever the policy. Knows no torch and no model.
"""

from dataclasses import dataclass
from typing import Literal

DecodePath = Literal["resident", "interconnect", "cpu", "host", "host and disk"]

# The share of a bound to expect until it has been measured: the goals of this project. llama.cpp's
# static split reaches 0.54 to 0.78 of its own bound, a tuned resident MoE decode 0.51.
SHARE: dict[DecodePath, float] = {
    "resident": 0.60,
    "interconnect": 0.80,
    "cpu": 0.70,
    "host": 0.70,
    "host and disk": 0.70,
}


@dataclass(frozen=True)
class Rate:
    """Bytes a second, and where the figure comes from."""

    bandwidth: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast each memory is read: by the device its own memory and, over the interconnect, the
    host's; by the CPU host memory and the disk.
    """

    device: Rate
    interconnect: Rate
    host: Rate
    disk: Rate


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """The bytes of one decode step.

    Attributes:
        dense: bytes that every step reads: attention, router, norms, head (D).
        activations: distinct experts that the step reads, over all layers (A). expert: bytes of
            one expert (S).
        hit: the share of activations that the fastest tier holds (h). cold: that only the disk
            holds (f).
        layers: L.
        wait_s: how long a layer waits for the host (t), in seconds; 0 for a bound.
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
        """Bytes of experts that come from the next tier, m A S."""
        return (1 - self.hit) * self.activations * self.expert

    def seconds(self, path: DecodePath, rates: Rates) -> float:
        """The least time of the step, in seconds."""
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
