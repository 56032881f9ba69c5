"""Ways of reading experts, turn by turn: the same logits, and a refusal where all experts fit."""

import pytest
import torch

from qmix import MixtralForCausalLM
from qmix.errors import UsageError
from qmix.evals.offload_turns import WAYS, Ways, drop, turns
from qmix.models.offload import Tiers
from tests.support.models import load_in_tiers


def test_every_way_gives_the_same_logits(tiny_nf4):
    model = load_in_tiers(tiny_nf4, "cpu", tiers=Tiers(device=0, host=8))
    model.store.reader.cached_share = 0.0  # nothing is to stay in the page cache
    found = list(turns(model, 4, 0.5, lambda: drop(tiny_nf4)))
    assert len(found) == 4
    for seconds, logits in found:
        assert seconds.keys() == set(WAYS)
        assert all(torch.equal(logits[way], logits["apart"]) for way in WAYS)
    done = model.store.statistics()
    assert done.tokens == 4 * len(WAYS)
    assert done.ahead > 0


def test_a_model_that_fits_has_no_ways(tiny_nf4):
    model = MixtralForCausalLM.from_pretrained(tiny_nf4, device="cpu")
    with pytest.raises(UsageError, match="all experts fit"):
        Ways(model)
