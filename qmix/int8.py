"""Int8: a weight in 8-bit integers with one scale, and perhaps one zero, per group of inputs.

Shape letters: N output features, K input features. Knows nothing of files or of kernels.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qmix.integers import Integers, symmetric_zero


@dataclass(frozen=True, eq=False)
class Int8(Integers):
    """A weight in 8-bit integers, a byte a code; symmetric with zeros of 128."""

    bits: ClassVar[Literal[4, 8]] = 8
    kind: ClassVar[Literal["int4", "int8"]] = "int8"

    @classmethod
    def packed(cls, codes: Tensor) -> Tensor:
        """uint8 [N, K]: a code is a byte."""
        return codes

    @classmethod
    def reordered(cls, packed: Tensor, order: Tensor) -> Tensor:
        """Codes [N, K] whose j-th input is the `order[j]`-th of those given."""
        return packed.index_select(1, order)

    def _floats(self, packed: Tensor) -> Tensor:
        return packed.float().sub_(self._shift)

    def _floats_into(self, packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        # A conversion that numpy vectorizes: a third of the time of a look-up as Int4's.
        np.subtract(packed, np.float32(self._shift), out=out)

    @property
    def _shift(self) -> int:
        return symmetric_zero(self.bits) if self.zeros is None else 0
