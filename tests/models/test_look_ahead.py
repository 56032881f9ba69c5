"""Experts that are read before the router has chosen them: the same bits, and nobody's slot."""

import pytest
import torch

from qmix.errors import CheckpointError
from qmix.experts.foresight import Foresight
from qmix.models.offload import Tiers
from tests.support.models import load_in_tiers

IDS = torch.arange(3, 12)


@pytest.fixture(scope="module")
def folder(tiny_nf4):
    return tiny_nf4


def offloaded(folder, expect=None):
    """The tiny model with 6 of 24 experts in memory.

    Args:
        expect: what each layer expects of the next one; default: what the routers say.
    """
    model = load_in_tiers(folder, "cpu", tiers=Tiers(device=0, host=6))
    model.store.reader.cached_share = 0.0
    if expect is not None:
        for layer in model.model.layers[:-1]:
            layer.block_sparse_moe.stored._expect = expect
    return model


def logits(model):
    cache = model.new_cache(1)
    with torch.no_grad():
        return [model.next_logits(index.view(1, 1), cache) for index in IDS]


@pytest.fixture(scope="module")
def expected(folder):
    model = offloaded(folder)
    model.store.looks_ahead = False
    found = logits(model)
    assert model.store.statistics().ahead == model.store.statistics().dropped == 0
    return found


def test_reads_ahead_change_no_bit_and_no_slot(folder, expected):
    model = offloaded(folder)
    assert all(map(torch.equal, logits(model), expected))
    done = model.store.statistics()
    assert 0 < done.ahead < done.misses
    plain = offloaded(folder)
    plain.store.looks_ahead = False
    logits(plain)
    plain.store.end_token()
    assert plain.store.residency.id_of_slot == model.store.residency.id_of_slot
    assert plain.store.statistics().disk_bytes == done.disk_bytes
    assert sorted(model.store._blobs) == list(range(8))


def test_nothing_is_copied_ahead_that_the_page_cache_keeps(folder, expected):
    model = offloaded(folder, lambda x: pytest.fail("asked for what is expected"))
    model.store.reader.cached_share = 1.0
    assert all(map(torch.equal, logits(model), expected))
    assert model.store.statistics().ahead == model.store.statistics().dropped == 0


def test_wrong_expectations_are_given_up(folder, expected):
    model = offloaded(folder, lambda x: (7, 6))
    model.store._foresight.right = 0.5
    assert all(map(torch.equal, logits(model), expected))
    done = model.store.statistics()
    assert done.dropped > 0
    assert not model.store._foresight.pays
    dropped = done.dropped
    logits(model)
    assert model.store.statistics().dropped == dropped


def test_an_early_read_that_fails_is_an_error_only_where_it_is_needed(folder, expected):
    model = offloaded(folder, lambda x: (0, 1))
    store = model.store
    read, failing = store.reader.read, []

    def broken(expert, blob, spread):
        if failing and expert in failing:
            raise CheckpointError("broken")
        return read(expert, blob, spread)

    store._blob_reads._read_into = broken
    used = set()
    reach = store.reach
    store.reach = lambda layer, ids: used.update(ids) or reach(layer, ids)
    assert all(map(torch.equal, logits(model), expected))
    failing += set(range(24)) - used
    assert failing
    assert all(map(torch.equal, logits(model), expected))
    assert store.statistics().failures == 0
    failing += sorted(used)
    with pytest.raises(CheckpointError, match="broken"):
        logits(model)


def test_a_step_that_was_interrupted_leaves_no_read_ahead(folder, expected):
    model = offloaded(folder)
    gate = model.model.layers[1].block_sparse_moe
    plain, gate.moe_forward = gate.moe_forward, None
    with pytest.raises(TypeError):
        logits(model)
    assert model.store._ahead
    gate.moe_forward = plain
    assert all(map(torch.equal, logits(model), expected))


def test_foresight_forgets():
    foresight = Foresight()
    foresight.seen((1, 2), (1, 2))
    assert foresight.right == 1
    for _ in range(30):
        foresight.seen((1, 2), (3, 4))
    assert not foresight.pays
    for _ in range(60):
        foresight.seen((1,), (1, 4))
    assert foresight.pays
