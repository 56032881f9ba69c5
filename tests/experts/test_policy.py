"""Heat and recency behind one key, their presets, and the heat file."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import CheckpointError, UsageError, WriteError
from qmix.experts import heat_file
from qmix.experts.policy import HEAT, LFU, LRU, ONE, PRESETS, STATIC, Policy, PolicySettings

TOKENS = st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=40)


def after(settings, tokens, experts=6, **options):
    policy = Policy(experts, settings, **options)
    for token in tokens:
        policy.used(token)
    return policy


@given(TOKENS)
def test_heat_is_the_sum_of_uses_decayed_by_their_age(tokens):
    policy = after(HEAT, tokens)
    for expert in range(6):
        ages = [len(tokens) - 1 - at for at, token in enumerate(tokens) if expert in token]
        exact = sum((HEAT.decay / ONE) ** age for age in ages)
        # Every token's shift drops less than one of 65536 parts.
        assert exact - len(tokens) / ONE <= policy.heat[expert] / ONE <= exact + 1e-9


@given(TOKENS)
def test_lfu_counts_tokens_and_static_learns_nothing(tokens):
    counts = [sum(expert in token for token in tokens) for expert in range(6)]
    assert [heat // ONE for heat in after(LFU, tokens).heat] == counts
    assert after(STATIC, tokens, heat=[3, 1, 4, 1, 5, 9]).heat == [3, 1, 4, 1, 5, 9]


@given(TOKENS)
def test_the_lru_key_orders_by_last_activation(tokens):
    policy = after(LRU, tokens)
    # A repeated id counts where it stands first in its token.
    activations = [expert for token in tokens for expert in dict.fromkeys(token)]
    last = {
        expert: max(i for i, e in enumerate(activations) if e == expert)
        for expert in set(activations)
    }
    expected = sorted(range(6), key=lambda expert: (last.get(expert, -1), expert))
    assert sorted(range(6), key=policy.key) == expected


@given(TOKENS, st.sampled_from(list(PRESETS.values())))
def test_no_two_keys_are_equal(tokens, settings):
    policy = after(settings, tokens)
    assert len({policy.key(expert) for expert in range(6)}) == 6


def test_equal_heat_falls_to_the_one_unused_for_longer():
    policy = after(LFU, [[2, 1], [0]])
    assert policy.heat[:3] == [ONE, ONE, ONE]
    assert sorted((0, 1, 2), key=policy.key) == [2, 1, 0]


def test_a_warm_start_without_heat_goes_in_turn_over_the_layers():
    assert Policy(6).order(3) == [0, 3, 1, 4, 2, 5]
    assert Policy(6, heat=[0, 0, 7, 9, 0, 0]).order(3) == [3, 2, 0, 1, 4, 5]


@pytest.mark.parametrize(
    "bad", [{"decay": ONE + 1}, {"decay": -1}, {"margin": -1}, {"uploads": -1}, {"gain": -1}]
)
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        PolicySettings(**bad)


def test_a_heat_file_comes_back_and_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "deep" / "heat.json"
    heat_file.save(path, [1, 2, 3], model="m")
    heat_file.save(path, [4, 5, 1 << 40], model="m")
    assert heat_file.read(path, experts=3, model="m") == [4, 5, 1 << 40]
    assert heat_file.read_if_good(path, experts=3, model="m") == [4, 5, 1 << 40]
    assert os.listdir(path.parent) == ["heat.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "heat.json"
    heat_file.save(path, [1], model="m")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match="No space left"):
        heat_file.save(path, [2], model="m")
    assert heat_file.read(path, experts=1, model="m") == [1]
    assert os.listdir(tmp_path) == ["heat.json"]


GOOD = {"format": "qmix-heat", "version": 1, "model": "m", "heat": [1, 2, 3]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        (json.dumps(GOOD)[:-9], "not valid JSON"),
        ("[1, 2, 3]", "an object"),
        (json.dumps({**GOOD, "format": "other"}), "not a heat file"),
        (json.dumps({**GOOD, "version": 2}), "not a heat file"),
        (json.dumps({**GOOD, "model": "other"}), "another model"),
        (json.dumps({**GOOD, "heat": [1, 2]}), "3 experts"),
        (json.dumps({**GOOD, "heat": [1, 2, -3]}), "whole numbers"),
        (json.dumps({**GOOD, "heat": [1, 2, True]}), "whole numbers"),
        (json.dumps({**GOOD, "heat": [1, 2, 0.5]}), "whole numbers"),
        (json.dumps({**GOOD, "heat": {"0": 1}}), "whole numbers"),
    ],
)
def test_a_damaged_or_foreign_heat_file_is_refused_or_left_aside_with_one_line(
    tmp_path, text, says
):
    path = tmp_path / "heat.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=says) as caught:
        heat_file.read(path, experts=3, model="m")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.warns(UserWarning, match=says) as warned:
        assert heat_file.read_if_good(path, experts=3, model="m") is None
    assert len(warned) == 1


def test_no_heat_file_is_no_news(tmp_path):
    assert heat_file.read_if_good(tmp_path / "none.json", experts=3, model="m") is None
    with pytest.raises(CheckpointError, match="no such file"):
        heat_file.read(tmp_path / "none.json", experts=3, model="m")


def test_the_fingerprint_tells_routers_apart():
    prints = [heat_file.fingerprint(parts) for parts in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"])]
    assert len(set(prints)) == 3
    assert heat_file.fingerprint(iter([b"ab", b"c"])) == prints[0]
