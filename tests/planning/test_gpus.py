"""The table of cards."""

import pytest

from qmix.errors import UsageError
from qmix.planning import gpus


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("3090", "RTX 3090"),
        ("rtx-4090", "RTX 4090"),
        ("A100-40", "A100-40"),
        ("a100_80", "A100-80"),
        ("NVIDIA L40S", "L40S"),
        ("l4", "L4"),
        ("T4", "T4"),
    ],
)
def test_cards_are_found_as_people_name_them(text, name):
    assert gpus.find(text).name == name


@pytest.mark.parametrize("text", ["3080", "", "a100", "rtx", "abacus"])
def test_an_unknown_or_ambiguous_name_is_refused(text):
    with pytest.raises(UsageError, match="--card"):
        gpus.find(text)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA RTX A6000", "A6000"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4070 Ti", None),
        ("NVIDIA L40", None),
    ],
)
def test_cards_are_known_by_their_drivers_names(device, name):
    found = gpus.known(device)
    assert (found.name if found else None) == name


def test_the_table_is_plausible():
    assert len({card.name for card in gpus.CARDS}) == len(gpus.CARDS)
    for card in gpus.CARDS:
        assert 0.88 < card.vram / (card.nominal << 30) < 1.05, card  # as drivers report it
        assert 2e11 < card.bandwidth < 1e13
        assert card.read_bandwidth < card.bandwidth
        assert card.source
    assert not gpus.find("T4").supported
    assert gpus.of_size(24 << 30).name == "RTX 3090"
    assert gpus.of_size(16 << 30).supported
