"""What became of one tensor of a layer: the rounded weight, and how well it fits.

Knows nothing of how it was rounded.
"""

from dataclasses import dataclass

from qmix.formats.names import ModelTensor
from qmix.quantize.rounding import gptq
from qmix.weights.dense import Weight


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundedTensor:
    """One tensor of the layer after rounding.

    Attributes:
        weight: on the CPU; Dense where the recipe leaves the tensor as it is.
        tokens: number of tokens that the matrix saw; None if dense.
        solution: how it was rounded; None if dense.
        squared: the sums of (W - Q(W))^2 and of W^2; both 0 if dense.
        seconds: time spent; matrices that were rounded together share it equally.
    """

    tensor: ModelTensor
    weight: Weight
    tokens: int | None = None
    solution: gptq.Solution | None = None
    squared: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
