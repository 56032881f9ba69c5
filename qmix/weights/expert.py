"""One SwiGLU expert's three weights, and a layer's experts where all of them stay in memory.

Shape letters: D hidden width, F expert width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

from qmix.weights.dense import Weight


@dataclass(frozen=True, eq=False)
class Expert:
    """One SwiGLU expert: w1 (gate) and w3 (up) [F, D], w2 (down) [D, F]."""

    w1: Weight
    w2: Weight
    w3: Weight


class Resident(Sequence[Expert]):
    """Experts that all lie in memory and stay: asked for when they are needed, several at once."""

    def __init__(self, count: int, found: Callable[[int], Expert]) -> None:
        self._count, self._found = count, found

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Expert: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Expert]: ...
    def __getitem__(self, index: int | slice) -> Expert | Sequence[Expert]:
        if isinstance(index, slice):
            return [self._found(i) for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._found(index)
