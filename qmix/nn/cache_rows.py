"""CacheRows: the caches of several texts, each of its own length, as one batch of new positions.

Each row keeps its own KVCache, so that rows may join, leave and be rewound between two passes, and
nothing is padded or copied. Attention runs row by row; everything else of a layer takes the rows
together. Shape letters: see qmix.nn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.nn.cache import KVCache


class CacheRows:
    """A batch of B caches of one row each. A pass gives every row the same number of positions."""

    def __init__(self, rows: Sequence[KVCache]) -> None:
        assert rows
        assert all(row.batch == 1 for row in rows)
        self.rows = tuple(rows)

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return max(row.length for row in self.rows)

    def position_ids(self, new: int = 1) -> Tensor:
        """The positions of the next `new` columns, int64 (B, S)."""
        first = torch.tensor([[row.length] for row in self.rows])
        return first + torch.arange(new)

    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rows of different lengths have no keys [B, G, L, d]: attention asks each of `rows`."""
        raise AssertionError("attention takes the rows one by one")

    def align_mask(self, mask: Tensor, new: int, *, in_order: bool = False) -> Tensor:
        """A row has no padding, and no mask covers rows of different lengths."""
        raise AssertionError("rows of different lengths have no mask")

    def advance(self, positions: int) -> None:
        """Count the positions that every layer has appended to every row."""
        for row in self.rows:
            row.advance(positions)
