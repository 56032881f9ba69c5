"""The kernels that round groups, beside the loops in torch that they stand for.

Run by tests/quantize/rounding/test_gptq_kernels.py in processes of their own: interpreted, and as
PTX. Codes are equal but for values that lie between two codes to within a rounding.
"""

import pytest
import torch

from qmix.errors import CheckpointError
from qmix.quantize.rounding import gptq, gptq_choice, gptq_kernels
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.rounding.gptq_group import GroupLoops, GroupOptions
from qmix.quantize.rounding.gptq_kernels import GroupKernels
from qmix.quantize.rounding.hessian import Moments
from qmix.quantize.rounding.solver import Solver
from qmix.weights.affine import unpack_codes
from qmix.weights.scheme import Scheme
from tests.support.calibration import run, write_source
from tests.support.interpreter import AS_PTX, CONVERSIONS, DEVICE, drawn, skip_without_a_device

skip_without_a_device()
pytestmark = CONVERSIONS

DEFAULTS = GroupOptions(live_scales=True, scale_search=True, trials=8)
# What each case is for: matrices, size of a group, bits, symmetric, options. In Triton's
# interpreter a walk over 128 inputs takes seconds.
CASES = [
    (3, 32, 4, True, DEFAULTS),
    (1, 64, 4, False, DEFAULTS),
    (1, 32, 2, True, DEFAULTS),
    (1, 32, 3, False, GroupOptions(live_scales=True, scale_search=True, trials=3)),
    (1, 32, 8, False, GroupOptions(live_scales=False, scale_search=False, trials=1)),
]
COMPILED = [
    (1, 128, 4, True, DEFAULTS),
    (1, 64, 2, False, DEFAULTS),
]
LEFT_TO_SOAK = [
    (3, 128, 4, False, DEFAULTS),
    (1, 128, 8, True, DEFAULTS),
    (1, 64, 3, True, GroupOptions(live_scales=False, scale_search=True, trials=16)),
    (1, 32, 8, True, GroupOptions(live_scales=True, scale_search=False, trials=2)),
]


def problem(matrices, inputs, outputs):
    """Weights [B, K, N], H and its factor, of inputs that depend on one another."""
    x = drawn(matrices, 3 * inputs, inputs) @ drawn(inputs, inputs, seed=2) / inputs**0.5
    hessians = x.mT @ x
    hessians.diagonal(dim1=1, dim2=2).add_(0.05 * inputs)
    return drawn(matrices, inputs, outputs, seed=3), hessians, torch.linalg.cholesky(hessians)


def loss(solver):
    """Of each output."""
    return ((solver.hessians @ solver.errors) * solver.errors).sum(1)


def alike(found, wanted):
    assert (found.codes != wanted.codes).float().mean() < 0.002
    torch.testing.assert_close(loss(found).sum(), loss(wanted).sum(), rtol=1e-4, atol=0)
    for first, grid in wanted.grids.items():
        other, part = found.grids[first], slice(first, first + found.size)
        assert (other.scale != grid.scale).float().mean() < 0.02
        torch.testing.assert_close(other.scale, grid.scale, rtol=2e-3, atol=0)
        torch.testing.assert_close(other.low.expand_as(grid.low), grid.low)
        torch.testing.assert_close(other.high.expand_as(grid.high), grid.high)
        exact = found.weights[:, part] - found.codes[:, part] * other.scale[:, None]
        torch.testing.assert_close(found.errors[:, part], exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("matrices", "size", "bits", "symmetric", "options"),
    [
        *CASES,
        *(COMPILED if AS_PTX else []),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in LEFT_TO_SOAK),
    ],
)
def test_groups(matrices, size, bits, symmetric, options):
    """13 outputs leave columns of the last program empty."""
    weights, hessians, lower = problem(matrices, 2 * size, 13)
    scheme = Scheme(kind=f"int{bits}", group_size=size, symmetric=symmetric)
    found, wanted = (
        Solver(weights, hessians, scheme, size, steps)
        for steps in (GroupKernels(scheme, options, DEVICE), GroupLoops(scheme, options))
    )
    for solver in (found, wanted):
        solver.round_greedily(lower, lambda _: None)
    alike(found, wanted)
    for _ in range(2):
        for solver in (found, wanted):
            solver.refine(lambda _: None)
    alike(found, wanted)
    assert found.scale_overflows() == [False] * matrices


def moments_of(x):
    moments = Moments(x.shape[1], DEVICE, crossed=False)
    moments.add(x)
    return moments


@pytest.fixture
def by_kernels(monkeypatch):
    """Rounds groups by kernels on the CPU too."""

    def steps(device, size, scheme, options):
        used.append(size)
        return GroupKernels(scheme, options, device)

    used = []
    monkeypatch.setattr(gptq, "group_steps", steps)
    yield
    assert used


def solved(outputs=11):
    x = drawn(300, 64) @ drawn(64, 64, seed=2) / 8
    gradients = drawn(outputs, 50, seed=5)
    ((solution,),) = gptq.solve(
        drawn(1, outputs, 64, seed=3), [moments_of(x)], Scheme(kind="int4", group_size=32),
        RoundingOptions(), where=["f: w"], output_moments=[gradients @ gradients.T],
    )  # fmt: skip
    return solution


def test_a_whole_solve(by_kernels, monkeypatch):
    found = solved()
    monkeypatch.setattr(gptq, "group_steps", lambda d, size, *rest: GroupLoops(*rest))
    wanted = solved()
    codes = (unpack_codes(each.weight.codes, 4) for each in (found, wanted))
    assert torch.equal(*codes)
    assert torch.equal(found.weight.scales, wanted.weight.scales)
    assert found.output_error == pytest.approx(wanted.output_error, rel=1e-4)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN slice) :RuntimeWarning")
def test_weights_beyond_float16_scales_are_named(by_kernels):
    weights = drawn(1, 5, 64)
    weights[0, 2, 3] = 1e6
    x = drawn(200, 64, seed=2)
    with pytest.raises(CheckpointError, match=r"^f: w: weights too large.*scales below 65504"):
        gptq.solve(
            weights, [moments_of(x)], Scheme(kind="int4", group_size=32),
            RoundingOptions(refine=1), where=["f: w"],
        )  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(by_kernels, symmetric):
    weights = drawn(1, 9, 64)
    weights[0, 3] = 0
    weights[0, :, 32:] = 0
    ((found,),) = gptq.solve(
        weights, [moments_of(drawn(200, 64, seed=2))],
        Scheme(kind="int4", group_size=32, symmetric=symmetric),
        RoundingOptions(refine=1), where=["f: w"],
    )  # fmt: skip
    values = found.weight.dequantize(torch.float32)
    assert values.isfinite().all()
    assert not values[3].any()


@pytest.mark.skipif(not AS_PTX, reason="it takes too long in Triton's interpreter")
def test_a_layer(by_kernels, monkeypatch, tmp_path):
    """A model of one layer, by its loss; everything else on the CPU as ever."""
    source = write_source(tmp_path / "source", num_hidden_layers=1, num_local_experts=2)
    options = {"objective": "loss", "rounding": RoundingOptions(refine=1, trials=2)}
    found = run(source, tmp_path / "found", **options)
    monkeypatch.setattr(gptq, "group_steps", lambda d, size, *rest: GroupLoops(*rest))
    wanted = run(source, tmp_path / "wanted", **options)
    pairs = zip(found.tensors, wanted.tensors, strict=True)
    rounded = [(one, other) for one, other in pairs if other.output_error]
    assert len(rounded) == 4 + 2 * 3
    for one, other in rounded:
        assert one.output_error == pytest.approx(other.output_error, rel=1e-3)
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-3)


@pytest.mark.soak
def test_the_self_check_passes():
    scheme = Scheme(kind="int4", group_size=32)
    assert gptq_choice.first_miss(DEVICE, 32, scheme, DEFAULTS) is None


@pytest.mark.parametrize(
    ("spoiled", "what"),
    [("round", "codes after rounding"), ("refine", "codes after refining")],
)
def test_the_self_check_names_what_is_wrong(monkeypatch, spoiled, what):
    right = getattr(GroupKernels, spoiled)

    def wrong(self, group, *arguments):
        grid = right(self, group, *arguments)
        group.codes[:, 3] += 1
        return grid

    monkeypatch.setattr(gptq_kernels.GroupKernels, spoiled, wrong)
    scheme = Scheme(kind="int4", group_size=32)
    options = GroupOptions(live_scales=False, scale_search=False, trials=1)
    miss = gptq_choice.first_miss(DEVICE, 32, scheme, options)
    assert miss.what == f"{what} groups of 32"
