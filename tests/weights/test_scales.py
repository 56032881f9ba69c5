"""Nested scales: which maps are straight lines."""

import pytest
import torch

from qmix.weights.scales import NestedScales

MAPS = {
    "codes": (torch.arange(64.0), (0.0, 1.0)),
    "subtracted": (-torch.arange(64.0), (0.0, -1.0)),
    "signed": (torch.arange(64.0) - 32, (-32.0, 1.0)),
    "bent": (torch.arange(64.0).square(), (0.0, 0.0)),
    "all alike": (torch.full((64,), 3.0), (3.0, 0.0)),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_line_of_a_map(name):
    values, line = MAPS[name]
    scales = NestedScales(torch.zeros(1, 3, dtype=torch.uint8), torch.ones(1), values, bits=6)
    assert scales.line == line
