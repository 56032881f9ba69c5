"""Scale: how many replicas serve, and what each takes. Knows no Ray."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How many replicas there are, and what each takes.

    Attributes:
        least, most: replicas; where they differ, Ray adds one when more requests run and wait than
            the slots of those that are there, and removes one when fewer do.
        cpus, gpus: of each replica. Ray lets a replica compute by as many threads as it has CPUs.
    """

    least: int = 1
    most: int = 1
    cpus: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        assert 1 <= self.least <= self.most, self
