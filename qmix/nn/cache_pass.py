"""CachePass: the keys and values of one pass as a cache would store them; nothing is kept.

It lets a pass without a past compute what it computes with a cache in 8 bits. Shape letters: see
qmix.nn.
"""

from torch import Tensor

from qmix.kernels import kv_rows
from qmix.kv_format import KVFormat


class CachePass:
    """A Cache of no positions, whose new ones see each other as rows of codes if `kv` says so."""

    length = 0

    def __init__(self, kv: KVFormat) -> None:
        self.kv = kv

    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, in_order: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The new positions, see KVCache.append."""
        return kv_rows.encoded(self.kv, keys), kv_rows.encoded(self.kv, values)

    def align_mask(self, mask: Tensor, new: int, *, in_order: bool = False) -> Tensor:
        """The mask as it is."""
        return mask

    def advance(self, positions: int) -> None:
        """Count nothing."""
