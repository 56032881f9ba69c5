"""Whether the device reads a missing expert over PCIe, or the CPU multiplies it in host memory.

Decided by the measured bytes a second of both paths, with hysteresis. Knows no clock and no
tensors.
"""

from dataclasses import dataclass, field
from typing import Literal

MissPath = Literal["zero-copy", "cpu"]


@dataclass
class MissPathSelector:
    """Selects how misses are served: zero-copy until both paths have been measured.

    To leave zero-copy costs the recorded step (some milliseconds a token for launches and waits),
    and both paths read the same memory. The CPU must therefore be much faster to be selected; it
    stays selected while it is somewhat faster. Rates are moving averages of what was measured in
    service, so a path that becomes slow is left.

    Attributes:
        enter: the CPU is selected at this many times the interconnect's rate.
        leave: and left below this many times.
        weight: of a new measurement in the average.
        current: the path that is selected now. switches: how often it has changed.
        rates: bytes a second, by path.
    """

    enter: float = 2.0
    leave: float = 1.5
    weight: float = 0.25
    current: MissPath = "zero-copy"
    switches: int = 0
    rates: dict[MissPath, float] = field(default_factory=dict)

    def observe(self, path: MissPath, nbytes: int, seconds: float) -> None:
        """Add a measurement: this many bytes took this long."""
        if nbytes <= 0 or seconds <= 0:
            return
        rate, average = nbytes / seconds, self.rates.get(path)
        self.rates[path] = rate if average is None else average + self.weight * (rate - average)

    def choose(self) -> MissPath:
        """Select the path of the next token."""
        if len(self.rates) == 2:
            ratio = self.rates["cpu"] / self.rates["zero-copy"]
            if ratio >= self.enter:
                self._select("cpu")
            elif ratio < self.leave:
                self._select("zero-copy")
        return self.current

    def _select(self, path: MissPath) -> None:
        self.switches += path != self.current
        self.current = path
