"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmix.errors import UsageError
from qmix.planning.byte_sizes import parse_count, parse_size, show


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24G", 24 << 30),
        ("24GiB", 24 << 30),
        ("24 gib", 24 << 30),
        ("16GB", 16 * 10**9),
        ("500MB", 500 * 10**6),
        ("500M", 500 << 20),
        ("1.5T", 3 << 39),
        ("64KiB", 1 << 16),
        ("4096", 4096),
        (4096, 4096),
        ("7B", 7),
    ],
)
def test_the_spellings(text, nbytes):
    assert parse_size(text, where="--vram") == nbytes


@pytest.mark.parametrize(
    "text", ["24Q", "", "G", "-5G", "1e9", "1.2.3G", "٣G", "24 GG", "nan", "3X"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match=r"^--vram: not a size; expected"):
        parse_size(text, where="--vram")


def test_the_range():
    with pytest.raises(UsageError, match=r"out of range; expected 64.00 KiB to 1.00 GiB; found 3G"):
        parse_size("3G", where="--x", least=1 << 16, most=1 << 30)


@given(st.integers(0, 1 << 50))
def test_a_number_of_bytes_is_itself(nbytes):
    assert parse_size(nbytes, where="x") == nbytes
    assert show(nbytes).split()[1] in ("B", "KiB", "MiB", "GiB")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("8k", 8192), ("32K", 32768), ("1.5k", 1536), (" 300 ", 300), ("1m", 1 << 20), ("0", 0)],
)
def test_numbers_of_tokens(text, tokens):
    assert parse_count(text, where="--ctx") == tokens


@pytest.mark.parametrize("text", ["", "k", "8q", "-1", "1e3", "nan", "8kk", "1.0001k", "9" * 400])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(UsageError, match="--ctx: not a number of tokens"):
        parse_count(text, where="--ctx")
