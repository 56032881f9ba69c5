"""StepTuning: which launches of a decode step are one launch, a choice that only a card can make.

Knows no kernel. The defaults are reasoned, not measured. Every choice gives the same result, to the
same bits where it says so.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepTuning:
    """Settings of qmix.generation.static_decoder that only measurements can decide.

    Attributes:
        merge_in_split: the last split of a head merges the others; otherwise a launch of its own
            does, to the same bits.
    """

    merge_in_split: bool = True


UNTUNED = StepTuning()
