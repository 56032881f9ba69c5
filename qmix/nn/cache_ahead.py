"""CacheAhead: the next positions of a cache, written before it is known how many of them stay.

A decoder sees the positions as rows of one new position each, so that each is computed as a decode
step computes it: it attends to those before it and to itself. Knows nothing of tokens. Shape
letters: see qmix.nn.
"""

import torch

from qmix.nn.cache import KVCache
from qmix.nn.cache_rows import CacheRows


class CacheAhead:
    """The next S positions of a cache of one row, which does not count them until `keep`.

    A full ring loses its oldest positions to the new ones; `drop` puts them back.

    Attributes:
        rows: what a pass writes into, one row a position.
    """

    def __init__(self, cache: KVCache, positions: int) -> None:
        """At least one position, and at most as many as the window."""
        end = cache.length + positions
        assert cache.batch == 1
        assert 0 < positions <= (cache.window or positions)
        cache.reserve(end)
        self._cache = cache
        self.rows = CacheRows([cache.ahead(index) for index in range(positions)])
        # The first position whose slot holds another one.
        self._first = min(max(cache.length, cache.window or end), end)
        device = cache.storage(0)[0].device
        self._slots = torch.arange(self._first, end, device=device) % (cache.window or 1)
        self._overwritten = [
            tuple(ring[:, :, self._slots] for ring in cache.storage(layer))
            for layer in range(len(cache) if len(self._slots) else 0)
        ]

    def keep(self) -> None:
        """Count the next position."""
        self._cache.advance(1)

    def drop(self) -> None:
        """Forget the positions that were not kept."""
        kept = max(self._cache.length - self._first, 0)
        for layer, rings in enumerate(self._overwritten):
            for ring, old in zip(self._cache.storage(layer), rings, strict=True):
                ring[:, :, self._slots[kept:]] = old[:, :, kept:]
        self._overwritten = []
