"""The benchmark beside bitsandbytes runs; what it finds is for a record, not for a test."""

import pytest

from qmix.evals.timing import nf4_speed
from tests.support.oracles import eager_bitsandbytes

eager_bitsandbytes()


def test_a_row_for_each_comparison(capsys):
    nf4_speed.main(["--rows", "64", "--columns", "128", "--rounds", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| quantize bfloat16", "| dequantize to bfloat16", "| dequantize to float32",
    ]  # fmt: skip
    assert all(float(cell) >= 0 for line in lines[2:] for cell in line.strip("| ").split(" | ")[1:])


def test_both_take_turns_and_keep_their_best():
    order, ticks = [], iter([0, 5, 10, 12, 20, 23, 30, 34])
    found = nf4_speed.time_both(
        "what", lambda: order.append("a"), lambda: order.append("b"), 2, lambda: next(ticks)
    )
    assert order == ["a", "b", "a", "b"]
    assert (found.qmix, found.bitsandbytes) == (3, 2)
    assert found.ratio == pytest.approx(2 / 3)
