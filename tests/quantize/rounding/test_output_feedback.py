"""Outputs that make up for the errors of others, against outputs that are rounded independently."""

from itertools import pairwise

import pytest
import torch

from qmix.quantize.rounding import gptq
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.rounding.hessian import Moments
from qmix.quantize.rounding.output_feedback import OutputFeedback
from qmix.weights.scheme import Scheme

INT4 = Scheme(kind="int4", group_size=32)
QUICK = RoundingOptions(trials=2, refine=1)
OUTPUTS, INPUTS = 160, 64


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(seed):
    return normal(seed, 512, INPUTS) @ normal(seed + 1, INPUTS, INPUTS)


def gradients_of(seed):
    """Second moments of few directions, and of some noise."""
    g = normal(seed + 2, 400, 12) @ normal(seed + 3, 12, OUTPUTS) + normal(seed + 4, 400, OUTPUTS)
    return g.T @ g


def solve(weights, inputs, gradients, scheme=INT4):
    moments = []
    for x in inputs:
        moments.append(Moments(INPUTS, torch.device("cpu"), crossed=False))
        moments[-1].add(x)
    where = ["f: w"] * len(weights)
    found = gptq.solve(
        torch.stack(weights), moments, scheme, QUICK, where=where, output_moments=gradients
    )
    return [solutions[0] for solutions in found]


def loss(weight, solution, x, gradients):
    errors = (weight - solution.weight.dequantize(torch.float32)).double()
    inner = errors @ (x.T @ x).double() @ errors.T
    return float((gradients.double() * inner).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_at_the_end_falls_for_every_matrix_of_a_batch(symmetric):
    scheme = Scheme(kind="int4", group_size=32, symmetric=symmetric)
    weights = [normal(seed, OUTPUTS, INPUTS) * 0.05 for seed in (10, 20)]
    inputs, gradients = [inputs_of(30), inputs_of(40)], [gradients_of(50), gradients_of(60)]
    alone = solve(weights, inputs, None, scheme)
    together = solve(weights, inputs, gradients, scheme)
    for weight, x, g, before, after in zip(
        weights, inputs, gradients, alone, together, strict=True
    ):
        assert loss(weight, after, x, g) < 0.7 * loss(weight, before, x, g)
        assert loss(weight, after, x, torch.eye(OUTPUTS)) > loss(
            weight, before, x, torch.eye(OUTPUTS)
        )


@pytest.mark.parametrize("gradients", [torch.eye(OUTPUTS), torch.zeros(OUTPUTS, OUTPUTS)])
def test_without_correlation_the_codes_are_those_of_independent_outputs(gradients):
    weight, x = normal(1, OUTPUTS, INPUTS) * 0.05, inputs_of(2)
    (alone,), (together,) = solve([weight], [x], None), solve([weight], [x], [gradients])
    assert torch.equal(alone.weight.codes, together.weight.codes)
    assert torch.equal(alone.weight.scales, together.weight.scales)
    assert alone.output_error == pytest.approx(together.output_error, rel=1e-5)


def test_the_blocks_are_all_outputs_from_the_last_on():
    feedback = OutputFeedback([gradients_of(3)])
    blocks = list(feedback.blocks())
    assert (blocks[0].stop, blocks[-1].start) == (OUTPUTS, 0)
    assert all(later.stop == earlier.start for earlier, later in pairwise(blocks))
    assert len(blocks) > 1


def test_a_correction_is_the_best_answer_to_the_errors_so_far():
    """With one block left, no other errors of it give a smaller loss."""
    gradients = gradients_of(5)
    feedback = OutputFeedback([gradients])
    *_, rows = feedback.blocks()
    after = slice(rows.stop, OUTPUTS)
    errors = normal(6, 1, INPUTS, OUTPUTS)
    best = errors.clone()
    best[:, :, rows] = -feedback.correction(errors[:, :, after], rows)
    order = feedback.order[0]
    damped = gradients + 0.02 * gradients.diagonal().mean() * torch.eye(OUTPUTS)
    ordered = damped[order][:, order]
    slope = (best[0] @ ordered)[:, rows]
    assert float(slope.norm()) < 1e-4 * float((best[0].abs() @ ordered.abs())[:, rows].norm())
