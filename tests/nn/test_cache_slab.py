"""Rows of a slab are caches of their own, wherever they lie."""

import random

import pytest
import torch

from qmix.nn.cache_slab import CacheSlab, only_slab_rows
from tests.support.models import small_model

MODEL = small_model(num_hidden_layers=2)
ROWS, POSITIONS = 4, 40


def slab_of(config):
    slab = CacheSlab(config, ROWS, POSITIONS, dtype=torch.float32, device=torch.device("cpu"))
    for layer in slab.storage:
        for tensor in layer:
            tensor.fill_(float("nan"))
    return slab


def appended(cache, seed, new):
    """New positions in every layer; the same seed gives the same."""
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 2, 1, cache[0][0].shape[1], new, cache[0][0].shape[3], generator=draw)
    for layer in range(2):
        cache.append(layer, keys[0, layer], keys[1, layer])
    cache.advance(new)


@pytest.mark.parametrize("window", [None, 8])
def test_rows_that_change_places_hold_what_caches_of_their_own_hold(window):
    config = small_model(num_hidden_layers=2, sliding_window=window).config
    slab, draw = slab_of(config), random.Random(0)
    alone = [
        small_model(num_hidden_layers=2, sliding_window=window).new_cache() for _ in range(ROWS)
    ]
    for seed in range(60):
        place = draw.randrange(ROWS)
        row, own = slab.rows[place], alone[place]
        if own.length > 30 or draw.random() < 0.1:
            row.rewind(0)
            own.rewind(0)
        new = draw.choice([1, 1, 1, 3])
        appended(row, seed, new)
        appended(own, seed, new)
        together = draw.sample(slab.rows, draw.randrange(1, ROWS + 1))
        front = slab.front(together)
        assert front.batch == len(together)
        assert sorted(row.place for row in together) == list(range(len(together)))
        assert {id(row) for row in front.rows} == {id(row) for row in together}
        assert front.length == max(row.length for row in together)
        for row in front.rows:
            keys, values = front.storage(1)
            stored = row.stored_length
            assert torch.equal(keys[row.place, :, :stored], row.storage(1)[0][0, :, :stored])
            assert values.data_ptr() == slab.storage[1][1].data_ptr()
        for row, own in zip(slab.rows, alone, strict=True):
            assert row.length == own.length
            for one, other in zip(row, own, strict=True):
                assert all(map(torch.equal, one, other))


def test_rows_stay_where_they_are_while_the_same_ones_go_on():
    slab = slab_of(MODEL.config)
    first = slab.front(slab.rows[2:])
    places = [row.place for row in slab.rows]
    assert slab.front(slab.rows[2:]) is first
    assert slab.front(slab.rows[:1:-1]) is first
    assert [row.place for row in slab.rows] == places
    keys, _ = first.storage(0)
    assert first.storage(0)[0] is keys


def test_only_rows_of_one_slab_go_together():
    one, other = slab_of(MODEL.config), slab_of(MODEL.config)
    assert only_slab_rows(one.rows) == one.rows
    assert only_slab_rows([one.rows[0], other.rows[0]]) == []
    assert only_slab_rows([one.rows[0], MODEL.new_cache()]) == []


def test_a_row_never_grows():
    row = slab_of(MODEL.config).rows[1]
    row.reserve(POSITIONS)
    with pytest.raises(AssertionError, match="41 positions in a slab of 40"):
        row.reserve(POSITIONS + 1)
