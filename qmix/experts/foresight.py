"""Whether it pays to read the experts that a layer is expected to choose: how often that was right.

Knows no router, no reads and no clock.
"""

from collections.abc import Collection
from dataclasses import dataclass

_MEMORY = 64  # expected experts, about: two tokens of 32 layers that expect one each
# Below that more bytes are read in vain than for use, which takes from the disk and the cores.
_LEAST_RIGHT = 0.5


@dataclass
class Foresight:
    """How right expectations were lately.

    Attributes:
        right: the share of expected experts that were chosen, of 1; late ones count most.
        taken, dropped: how many experts had been asked for when they were needed, and how many had
            been asked for that were not.
    """

    right: float = 1.0
    taken: int = 0
    dropped: int = 0

    @property
    def pays(self) -> bool:
        """Whether most of what is expected comes."""
        return self.right >= _LEAST_RIGHT

    def seen(self, expected: Collection[int], chosen: Collection[int]) -> None:
        """A layer chose these, where those were expected; whether they were read or not."""
        for expert in expected:
            self.right += ((expert in chosen) - self.right) / _MEMORY
