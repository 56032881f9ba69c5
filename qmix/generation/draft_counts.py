"""DraftCounts: what drafts have done, for statistics. Knows no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftCounts:
    """What drafts have done.

    Attributes:
        passes: through the model, each for at least one id.
        drafted: ids. accepted: those of them that were chosen.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def ids_per_pass(self) -> float:
        """1 where nothing was accepted."""
        return 1 + self.accepted / max(self.passes, 1)

    def __add__(self, other: "DraftCounts") -> "DraftCounts":
        return DraftCounts(
            passes=self.passes + other.passes,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
        )

    def __str__(self) -> str:
        return (
            f"{self.drafted:,} drafted, {self.accepted:,} accepted; "
            f"{self.ids_per_pass:.1f} tokens a pass"
        )
