"""Second moments: symmetric sums in panels, and merged ones."""

import pytest
import torch

from qmix.quantize.rounding import hessian
from qmix.quantize.rounding.hessian import Moments, add_symmetric


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [7, 32, 33, 96, 100])
def test_a_sum_in_panels_is_the_sum_and_symmetric(monkeypatch, width):
    monkeypatch.setattr(hessian, "SYMMETRIC_PANEL", 32)
    total, rows = torch.zeros(width, width), [normal(50, width, seed=seed) for seed in range(3)]
    for part in rows:
        add_symmetric(total, part)
    exact = sum(part.double().T @ part.double() for part in rows)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)
    above = torch.ones(width, width, dtype=torch.bool).triu(32)
    assert torch.equal(total[above], total.T[above])


def test_a_narrow_sum_is_one_product_to_the_bit():
    rows, total = normal(50, 96), torch.zeros(96, 96)
    add_symmetric(total, rows)
    assert torch.equal(total, torch.zeros(96, 96).addmm_(rows.T, rows))


def test_moments_in_panels_keep_weights_and_the_crossed_sum(monkeypatch):
    x, exact, weights = normal(40, 48), normal(40, 48, seed=1), torch.rand(40)
    sums = []
    for panel in (1024, 16):
        monkeypatch.setattr(hessian, "SYMMETRIC_PANEL", panel)
        moments = Moments(48, torch.device("cpu"), crossed=True)
        moments.add(x[:25], weights[:25], exact=exact[:25])
        other = Moments(48, torch.device("cpu"), crossed=True)
        other.add(x[25:], weights[25:], exact=exact[25:])
        moments.merge(other)
        sums.append(moments)
    torch.testing.assert_close(sums[0].hessian, sums[1].hessian)
    torch.testing.assert_close(sums[0].cross, sums[1].cross)
    assert sums[0].samples == sums[1].samples
