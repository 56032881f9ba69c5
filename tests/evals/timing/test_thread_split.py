"""How the kernels' work is split over threads: what is recorded, and what is made of it."""

from dataclasses import replace

import pytest
import torch

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.evals import threads as command
from qmix.evals.timing import thread_split
from qmix.evals.timing.thread_split import Machine, Prediction, Region, Split, predict, split_of
from tests.support.cpu_kernels import random_int4, seeded

FREE = Machine(fork=0, fork_each=0, counter=0)


def split(threads, *regions, serial=0.0, outside=0.0):
    return Split(threads, tuple(Region(*region) for region in regions), serial, outside)


def test_pieces_that_divide_evenly_leave_no_thread_idle():
    assert predict(split(4, (8, 2.0)), FREE) == Prediction(
        threads=4, work=0.5, idle=0.0, counter=0.0, memory=0.0, forks=0.0, serial=0.0, outside=0.0
    )


def test_the_last_pieces_the_counter_and_the_memory_are_waited_for():
    nine = predict(split(8, (9, 0.9)), FREE)
    assert (nine.work, nine.idle) == pytest.approx((0.1125, 0.0875))
    counted = predict(split(4, (1000, 1.0)), replace(FREE, counter=1e-3))
    assert (counted.work, counted.counter) == pytest.approx((0.25, 0.75))
    fed = predict(split(4, (8, 2.0)), replace(FREE, speedup=2))
    assert fed.seconds == pytest.approx(1.0)


def test_forks_and_serial_parts_do_not_shrink():
    machine = replace(FREE, fork=1.0, fork_each=0.5)
    found = predict(split(4, (4, 4.0), (4, 4.0), serial=3.0, outside=8.0), machine)
    assert (found.forks, found.serial, found.outside) == (4.0, 3.0, 2.0)
    alone = predict(split(1, (4, 4.0), serial=3.0, outside=8.0), machine)
    assert alone.seconds == alone.work + 3.0 + 8.0


def test_every_piece_is_recorded_and_computed(compiled):
    weight = random_int4(1050, 1024, 8)
    x = torch.randn(33, 1024, generator=seeded()).bfloat16()
    expected = kernels.linear(x, weight)
    outs = []
    for threads in (2, 16, 64):
        found = split_of(lambda: outs.append(kernels.linear(x, weight)), threads, turns=2)
        assert max(region.pieces for region in found.regions) >= min(threads, 1050 / 48)
        assert found.seconds > 0
        assert found.serial >= 0
    assert all(torch.equal(out, expected) for out in outs)


def test_a_prompt_reads_each_row_of_a_weight_once(compiled):
    """Of 512 tokens: as many pieces as of 129, and one piece decodes its rows for all of them."""
    weight = random_int4(960, 512, 4)
    pieces = []
    for tokens in (129, 512):
        x = torch.randn(tokens, 512, generator=seeded()).bfloat16()
        found = split_of(lambda x=x: kernels.linear(x, weight), 2, turns=1)
        pieces.append(found.regions[-1].pieces)
    assert pieces[0] == pieces[1] > 1


def test_the_command_prints_predictions(compiled, monkeypatch, capsys):
    small = MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=64,
        num_hidden_layers=1,
    )
    monkeypatch.setattr(command, "MixtralConfig", lambda: small)
    assert command.main(["--tokens", "1,20", "--threads", "1,4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[4:] if line] == [
        ["| 1", "1"], ["| 1", "4"], ["| 20", "1"], ["| 20", "4"],
    ]  # fmt: skip
    assert thread_split.library().functions.threads is None  # as before
