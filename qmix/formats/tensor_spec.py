"""What will be written of a tensor: its name, dtype and shape. Knows no file and no layout."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written; the shape may be an upper bound."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize
