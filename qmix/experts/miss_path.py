"""Whether the device reads a missing expert over PCIe, or the CPU multiplies it where it lies.

By measured bytes a second of both, with hysteresis. Pure Python: knows no clock, no tensors.
"""

from dataclasses import dataclass, field
from typing import Literal

MissPath = Literal["zero-copy", "cpu"]


@dataclass
class MissPathSelector:
    """The way of misses; zero-copy until both have been measured.

    Leaving zero-copy costs the recorded step (some milliseconds a token of launches and waits), and both ways read the
    same memory, so the CPU must be much faster; it stays while it is somewhat faster. Rates are moving
    averages of what was really reached: a way that collapses in service is left.

    Attributes:
        enter: the CPU is taken at this many times the interconnect's rate.
        leave: and left below this many times.
        weight: of a new measurement in the average.
        current: the way. switches: how often it changed.
        rates: bytes a second, by way.
    """

    enter: float = 2.0
    leave: float = 1.5
    weight: float = 0.25
    current: MissPath = "zero-copy"
    switches: int = 0
    rates: dict[MissPath, float] = field(default_factory=dict)

    def observe(self, way: MissPath, nbytes: int, seconds: float) -> None:
        """So many bytes took so long."""
        if nbytes <= 0 or seconds <= 0:
            return
        rate, known = nbytes / seconds, self.rates.get(way)
        self.rates[way] = rate if known is None else known + self.weight * (rate - known)

    def choose(self) -> MissPath:
        """The way of the next token."""
        if len(self.rates) == 2:
            ratio = self.rates["cpu"] / self.rates["zero-copy"]
            if ratio >= self.enter:
                self._take("cpu")
            elif ratio < self.leave:
                self._take("zero-copy")
        return self.current

    def _take(self, way: MissPath) -> None:
        self.switches += way != self.current
        self.current = way
