"""Ways of reading a checkpoint's weights, turn by turn, and their record."""

import json

import pytest

from qmix.evals import load_turns
from qmix.evals.load_turns import WAYS, Loads


def test_every_way_is_timed_cold_and_warm_and_recorded(tiny_nf4, tmp_path, capsys):
    record = tmp_path / "record.json"
    given = [str(tiny_nf4), "--turns", "1", "--bytes", "300kB", "--json", str(record)]
    assert load_turns.main(given) == 0
    kept = json.loads(record.read_text())
    found = [(turn["way"], turn["cold"]) for turn in kept["turns"]]
    assert found == [(way, cold) for cold in (True, False) for way in WAYS]
    assert all(turn["ratio"] > 0 and turn["gigabytes_s"] > 0 for turn in kept["turns"])
    assert kept["bytes"] >= 300_000
    assert "of the disk's rate" in capsys.readouterr().out


@pytest.mark.parametrize("way", WAYS)
def test_a_way_reads_what_the_files_hold(tiny_nf4, way):
    loads = Loads(tiny_nf4, 300_000)
    read = loads.read(way)
    assert read.keys() == set(loads.checkpoint.stored(loads.tensors[-1]))
    for name, tensor in read.items():
        assert tensor.equal(loads.checkpoint.read(name))


def test_what_is_no_checkpoint_is_an_error(tmp_path, capsys):
    assert load_turns.main([str(tmp_path)]) != 0
    assert "load_turns:" in capsys.readouterr().err
