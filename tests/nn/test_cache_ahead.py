"""Positions that are written before it is known how many of them stay."""

import pytest
import torch

from qmix.nn.cache import KVCache
from qmix.nn.cache_ahead import CacheAhead
from tests.support.models import small_config


def filled(window, length):
    """A cache of one row whose position p holds p, and the model's config."""
    config = small_config(sliding_window=window, num_hidden_layers=2)
    cache = KVCache(config, 1, dtype=torch.float32, device=torch.device("cpu"))
    for position in range(length):
        write(cache, position)
        cache.advance(1)
    return cache


def write(cache, position):
    for layer in range(len(cache)):
        new = torch.full((1, 2, 1, 8), float(position))
        cache.append(layer, new, -new)


def positions(cache):
    keys, values = cache[1]
    assert torch.equal(keys, -values)
    return keys[0, 0, :, 0].tolist()


@pytest.mark.parametrize("window", [None, 4, 8])
@pytest.mark.parametrize("length", [0, 3, 7, 8, 21])
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_what_is_kept_stays_and_the_rest_was_never_there(window, length, kept):
    cache = filled(window, length)
    ahead = CacheAhead(cache, 4)
    assert [row.length for row in ahead.rows.rows] == [length + i for i in range(4)]
    for index, row in enumerate(ahead.rows.rows):
        write(row, 100 + index)
        first = max(length + index + 1 - (window or 99), 0)
        seen = [*range(length), 100, 101, 102, 103][first : length + index + 1]
        storage = row.storage(1)[0][0, 0, :, 0].tolist()
        assert sorted(storage[: len(seen)]) == sorted(map(float, seen))
    assert cache.length == length
    for _ in range(kept):
        ahead.keep()
    ahead.drop()
    ahead.drop()  # nothing more
    expected = [*range(length), 100, 101, 102, 103][: length + kept]
    assert cache.length == length + kept
    assert positions(cache) == expected[-(window or 99) :]


def test_rows_that_grow_the_cache_share_what_they_write():
    cache = filled(None, 254)
    ahead = CacheAhead(cache, 6)
    assert cache.capacity >= 260
    for index, row in enumerate(ahead.rows.rows):
        write(row, index)
    assert positions(ahead.rows.rows[5])[-5:] == [0, 1, 2, 3, 4]
