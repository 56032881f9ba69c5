"""Limits: what a server may hold. Knows nothing of how it is scheduled."""

from dataclasses import dataclass

from qmix.errors import UsageError

MAX_SLOTS = 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a scheduler may hold.

    Attributes:
        slots: requests that run at a time.
        waiting: requests that wait for a slot.
        context: tokens of a prompt and its reply.
        chunk: prompt tokens that are read between two decode steps.

    Raises:
        UsageError: one of them is out of its range.
    """

    context: int
    slots: int = 8
    waiting: int = 64
    chunk: int = 256

    def __post_init__(self) -> None:
        for name, least, most in (
            *(("slots", 1, MAX_SLOTS), ("waiting", 0, 1 << 20)),
            *(("context", 16, 1 << 24), ("chunk", 1, 1 << 20)),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise UsageError(
                    "out of range", where=name, expected=f"{least} to {most}", found=value
                )
