"""Tuning of attention: settings that only measurements can decide. Knows no kernel."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """How attention is cut into tiles and thread blocks. The defaults are reasoned, not measured.

    Attributes:
        columns: keys of a tile; None means 64, or 16 in float32.
        stages: tiles in flight.
        blocks_per_sm: the wanted number of thread blocks for each multiprocessor in a decode step.
    """

    columns: int | None = None
    stages: int = 2
    blocks_per_sm: int = 2


UNTUNED = Tuning()
