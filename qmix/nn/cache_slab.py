"""CacheSlab: the caches of several texts in one storage, for launches that serve them together.

Each row is a KVCache of its own. Rows of which the next positions are computed together are brought
to the first places, so that one view holds them and nothing else. That moves keys and values only
when a text joins or leaves. Shape letters: see qmix.nn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qmix.config import MixtralConfig
from qmix.kernels import kv_rows
from qmix.kv_format import KVFormat
from qmix.nn.cache import KVCache

# Of each layer: keys and values, [rows, G, positions, d], or d + 4 in 8 bits.
Storage = list[tuple[Tensor, Tensor]]


class SlabRow(KVCache):
    """A cache of one row in a slab; it never grows.

    Attributes:
        place: which row of the storage it has.
    """

    def __init__(self, config: MixtralConfig, slab: "CacheSlab", place: int) -> None:
        keys = slab.storage[0][0]
        super().__init__(config, 1, dtype=slab.dtype, device=keys.device, kv=slab.kv)
        self.slab = slab
        self.move(place)

    def move(self, place: int) -> None:
        """Have another row of the storage, with what that holds."""
        self.place = place
        self._keys = [keys[place : place + 1] for keys, _ in self.slab.storage]
        self._values = [values[place : place + 1] for _, values in self.slab.storage]

    def _grown(self, old: Tensor, positions: int) -> Tensor:
        raise AssertionError(f"{positions} positions in a slab of {old.shape[2]}")


class SlabFront:
    """The first rows of a slab: what a step of a batch reads and writes.

    Attributes:
        rows: in the order of their places.
    """

    def __init__(self, slab: "CacheSlab", batch: int) -> None:
        self._slab, self.batch = slab, batch
        self._storage = [(keys[:batch], values[:batch]) for keys, values in slab.storage]

    @property
    def rows(self) -> list[SlabRow]:
        return sorted(self._slab.rows, key=lambda row: row.place)[: self.batch]

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return max(row.length for row in self.rows)

    def storage(self, layer: int) -> tuple[Tensor, Tensor]:
        """See KVCache."""
        return self._storage[layer]


class CacheSlab:
    """Caches of one row each, in one storage.

    Attributes:
        storage: of each layer, keys and values; see KVCache.storage.
        rows: the caches.
    """

    def __init__(
        self,
        config: MixtralConfig,
        rows: int,
        positions: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv: KVFormat = "16",
    ) -> None:
        """Empty caches.

        Args:
            positions: that fit into each, or W if that is fewer.
            dtype, kv: see KVCache.
        """
        self.kv, self.dtype = kv, dtype
        width, stored = kv_rows.storage(kv, config.head_dim, dtype)
        slots = min(positions, config.sliding_window or positions)
        shape = (rows, config.num_key_value_heads, slots, width)
        self.storage: Storage = [
            (
                torch.empty(shape, dtype=stored, device=device),
                torch.empty(shape, dtype=stored, device=device),
            )
            for _ in range(config.num_hidden_layers)
        ]
        self.rows = [SlabRow(config, self, place) for place in range(rows)]
        self._fronts: dict[int, SlabFront] = {}

    def front(self, rows: Sequence[SlabRow]) -> SlabFront:
        """These rows, in whichever order, brought to the first places."""
        count = len(rows)
        outside = [row for row in rows if row.place >= count]
        inside = [row for row in self.rows if row.place < count and row not in rows]
        for row, other in zip(outside, inside, strict=True):
            self._exchange(row, other)
        if count not in self._fronts:
            self._fronts[count] = SlabFront(self, count)
        return self._fronts[count]

    def _exchange(self, row: SlabRow, other: SlabRow) -> None:
        """Let two rows change places, with what they hold."""
        stored = max(row.stored_length, other.stored_length)
        for layer in self.storage:
            for tensor in layer:
                one, two = tensor[row.place, :, :stored], tensor[other.place, :, :stored]
                kept = one.clone()
                one.copy_(two)
                two.copy_(kept)
        place, others = row.place, other.place
        row.move(others)
        other.move(place)


def only_slab_rows(rows: Sequence[object]) -> list[SlabRow]:
    """The rows, if they lie in one slab; else none."""
    found = [row for row in rows if isinstance(row, SlabRow)]
    is_one_slab = len(found) == len(rows) and len({id(row.slab) for row in found}) == 1
    return found if is_one_slab else []
