"""The three weights of a SwiGLU expert, and a layer's experts as a sequence.

Shape letters: see qmix.kernels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from qmix.weights.dense import Weight


@dataclass(frozen=True, eq=False)
class Expert:
    """One SwiGLU expert: w1 (gate) and w3 (up) [F, D], w2 (down) [D, F]."""

    w1: Weight
    w2: Weight
    w3: Weight


class ExpertSequence(Sequence[Expert], ABC):
    """A layer's experts, each looked up or created on access."""

    @abstractmethod
    def expert(self, index: int) -> Expert:
        """The expert at an index from 0 to the length less 1."""

    @overload
    def __getitem__(self, index: int) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Expert]: ...
    def __getitem__(self, index: int | slice) -> Expert | Sequence[Expert]:
        numbers = range(len(self))[index]
        if isinstance(numbers, int):
            return self.expert(numbers)
        return [self.expert(number) for number in numbers]
