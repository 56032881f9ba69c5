"""Units fit the size, and one thing is singular."""

import pytest

from qmix.quantities import a_second, amount, counted, duration, gigabytes, weights


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (17, "17 B"), (999, "999 B"), (999.96, "1.000 kB"), (99_999, "100.0 kB"),
     (999_949, "999.9 kB"), (5.312e6, "5.312 MB"), (23.804e9, "23.80 GB"), (1.5e12, "1.500 TB")],
)  # fmt: skip
def test_sizes(nbytes, text):
    assert gigabytes(nbytes) == text


def test_rates_weights_and_work():
    assert a_second(4_483_000, 1.0) == "4.483 MB/s"
    assert a_second(10, 0.0) == "-"
    assert (weights(46.7e9), weights(1792), weights(512)) == ("46.70 B", "1.792 k", "512")
    assert amount(3.2e7, "FLOP") == "32.00 MFLOP"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.004, "4 ms"), (0.31, "0.31 s"), (3.14, "3.1 s"), (9.96, "10 s"), (42, "42 s"),
     (119.7, "2 min"), (3599, "60 min"), (7300, "2 h 02 min"), (40 * 3600, "40 h 00 min"),
     (100 * 3600, "4 d 4 h")],
)  # fmt: skip
def test_times(seconds, text):
    assert duration(seconds) == text


def test_one_thing_is_singular():
    assert counted(1, "tensor") == "1 tensor"
    assert counted(0, "tensor") == "0 tensors"
    assert counted(2048, "line end") == "2,048 line ends"
    assert [counted(n, "matrix") for n in (1, 2)] == ["1 matrix", "2 matrices"]
    assert counted(3, "copy") == "3 copies"
