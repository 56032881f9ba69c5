"""What each of several GPUs takes: the model's bytes, split by heads, and refused where uneven."""

import pytest

from qmix.config import MixtralConfig
from qmix.errors import UnsupportedError
from qmix.planning.stored_model import StoredModel
from qmix.planning.tensor_parallel import SERVER_BYTES, share
from qmix.weights.scheme import Scheme

INT4 = Scheme(kind="int4", group_size=128)


def model(scheme=INT4, **changes):
    fields = {"num_hidden_layers": 2, "vocab_size": 32000, **changes}
    return StoredModel.assume("m", MixtralConfig(**fields), scheme)


def test_one_gpu_takes_the_files_the_cache_and_the_server():
    whole = model()
    found = share(whole, 1, 1024, batch=3)
    assert found.memory["keys and values"] == whole.kv_bytes(1024, 3)
    assert found.memory.total == whole.file_bytes + whole.kv_bytes(1024, 3) + SERVER_BYTES


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_gpus_share_evenly_but_for_router_and_norms(gpus):
    one, each = (share(model(), count, 1024).memory for count in (1, gpus))
    for item in ("experts", "attention", "keys and values", "router and norms"):
        parts = 1 if item == "router and norms" else gpus
        assert each[item] * parts == pytest.approx(one[item], rel=1e-3)
    assert one["embedding and head"] <= each["embedding and head"] * gpus


def test_more_gpus_than_heads_of_keys_hold_copies_of_them():
    few = model(num_key_value_heads=2)
    assert [share(few, count, 64).position_bytes for count in (1, 2, 4)] == [
        2 * 2 * 128 * 2 * 2,
        1 * 2 * 128 * 2 * 2,
        1 * 2 * 128 * 2 * 2,
    ]


def test_positions_are_what_the_budget_leaves():
    each = share(model(), 2, 1024)
    fixed = each.memory.total - each.memory["keys and values"]
    assert each.positions(fixed + 10 * each.position_bytes + 1) == 10
    assert each.positions(fixed - 1) == 0


@pytest.mark.parametrize(
    ("changes", "gpus", "word"),
    [
        ({}, 3, "32 heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 3072}, 4, "6 heads of keys"),
        ({"intermediate_size": 384}, 2, "384 inputs of w2 in groups of 128"),
    ],
)  # fmt: skip
def test_an_uneven_split_is_refused(changes, gpus, word):
    with pytest.raises(UnsupportedError, match=rf"--tp: .*{word}"):
        share(model(**changes), gpus, 64)


def test_groups_of_all_inputs_are_split_anywhere():
    share(model(Scheme(kind="int4", group_size=-1), intermediate_size=384), 2, 64)
