"""Matmuls that stay in bfloat16, for the tokens of a batch that decodes."""

import pytest
import torch

from qmix import kernels
from qmix.kernels.cpu.library import DENSE_TOKENS
from qmix.weights.dense import Dense


@pytest.mark.parametrize(("rows", "inputs"), [(1, 1), (5, 33), (33, 64), (37, 130)])
def test_a_tokens_sums_do_not_depend_on_how_many_there_are(isa, rows, inputs):
    torch.manual_seed(0)
    weight = torch.randn(rows, inputs).bfloat16()
    x = torch.randn(DENSE_TOKENS, inputs).bfloat16()
    exact = x.double() @ weight.double().T
    alone = torch.cat([kernels.linear(one, Dense(weight)) for one in x.split(1)])
    assert (alone.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    if isa != "torch":
        for tokens in range(1, DENSE_TOKENS + 1):
            assert torch.equal(kernels.linear(x[:tokens], Dense(weight)), alone[:tokens])
