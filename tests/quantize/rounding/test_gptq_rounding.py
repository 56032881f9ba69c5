"""GPTQ of one weight: against a plain one in numpy, and each switch against its absence."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from qmix.errors import CheckpointError
from qmix.formats.layouts import gptq as layout
from qmix.quantize.rounding import gptq, gptq_group, rtn
from qmix.quantize.rounding.gptq import RoundingOptions
from qmix.quantize.rounding.hessian import Moments
from qmix.weights.affine import unpack_codes
from qmix.weights.scheme import Scheme

CPU = torch.device("cpu")
INT4 = Scheme(kind="int4", group_size=32)
PLAIN = RoundingOptions(act_order=False, live_scales=False, scale_search=False, trials=1, refine=0)
OUTPUTS, INPUTS, TOKENS = 24, 128, 1024


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(seed=0, tokens=TOKENS, inputs=INPUTS):
    """Inputs of a falling spectrum, some channels much louder than others."""
    mixing = normal(seed + 1, inputs, inputs) * torch.arange(1, inputs + 1)[:, None] ** -0.7
    loud = torch.exp(normal(seed + 2, inputs))
    return normal(seed + 3, tokens, inputs) @ mixing * loud


def weight_of(seed=0, outputs=OUTPUTS, inputs=INPUTS):
    return normal(seed + 10, outputs, inputs) * 0.05


def moments_of(x, exact=None, token_weights=None):
    moments = Moments(x.shape[1], CPU, crossed=exact is not None)
    moments.add(x, token_weights, exact=exact)
    return moments


def with_hessian(hessian, tokens=1 << 20):
    """Moments as if so many inputs had made this sum."""
    moments = moments_of(torch.zeros(1, len(hessian)))
    moments._weight_sum = moments._square_sum = tokens
    moments.hessian.copy_(hessian)
    return moments


def solve(weight, moments, scheme=INT4, options=PLAIN):
    ((solution,),) = gptq.solve(weight[None], [moments], scheme, options, where=["f: w"])
    return solution


def loss(weight, solution, x):
    """|(W - Q) x|^2, of each output."""
    change = weight.double() - solution.weight.dequantize(torch.float32).double()
    return (change @ x.double().T).square().sum(1)


def codes_of(weight):
    return unpack_codes(weight.codes, weight.bits)


def plain_gptq(weight, x, size, bits, *, live):
    """The paper's algorithm: the inverse's Cholesky factor, one input after another; float64."""
    w, x = weight.double().numpy().copy(), x.double().numpy()
    columns = w.shape[1]
    hessian = x.T @ x
    damping = max(0.002, columns / (2 * len(x)))
    hessian += damping * np.mean(np.diag(hessian)) * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    found, original = np.zeros(w.shape), w.copy()
    scales = np.zeros((len(w), columns // size))
    for k in range(columns):
        if k % size == 0:
            group = (w if live else original)[:, k : k + size]
            extreme = group[np.arange(len(w)), np.abs(group).argmax(1)]
            scale = (extreme * 2 / ((1 << bits) - 1)).astype(np.float16).astype(np.float64)
            scales[:, k // size] = scale
        code = np.clip(np.round(w[:, k] / scale), low, high)
        found[:, k] = code - low
        missed = (w[:, k] - code * scale) / upper[k, k]
        w[:, k:] -= np.outer(missed, upper[k, k:])
    return torch.from_numpy(found).to(torch.uint8), torch.from_numpy(scales).half()


@pytest.mark.parametrize("live", [False, True], ids=["scales first", "live scales"])
@pytest.mark.parametrize("size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_without_its_switches_it_is_the_papers_algorithm(bits, size, live):
    weight, x = weight_of(), correlated()
    scheme = Scheme(kind="int4" if bits == 4 else "int8", group_size=size)
    options = RoundingOptions(
        act_order=False, live_scales=live, scale_search=False, trials=1, refine=0
    )
    solution = solve(weight, moments_of(x), scheme, options)
    codes, scales = plain_gptq(weight, x, INPUTS if size == -1 else size, bits, live=live)
    assert solution.weight.scheme == Scheme(
        kind=scheme.kind, group_size=128 if size == -1 else size
    )
    assert (codes_of(solution.weight) != codes).float().mean() < (0.002 if bits == 4 else 0.01)
    # A live scale is a float16 of a float32 that was computed in another order.
    assert torch.allclose(solution.weight.scales.float(), scales.float(), rtol=2e-3)
    assert solution.damping == INPUTS / (2 * TOKENS)
    assert (solution.raised, solution.fallback) == (0, None)


SWITCHES = [
    {"act_order": True},
    {"live_scales": True},
    {"scale_search": True},
    {"trials": 8},
    {"refine": 3},
]


def mean_loss(options, scheme=INT4, seeds=range(0, 800, 100)):
    """Relative to the plain one's, the geometric mean over weights and inputs."""
    logarithms = []
    for seed in seeds:
        weight, x = weight_of(seed), correlated(seed)
        logarithms.append(
            loss(weight, solve(weight, moments_of(x), scheme, options), x).sum().log()
        )
    return float(torch.stack(logarithms).mean().exp())


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: next(iter(switch)))
def test_each_switch_lowers_the_loss(switch):
    settings = {"live_scales": True} | vars(PLAIN) if "live_scales" not in switch else vars(PLAIN)
    assert mean_loss(RoundingOptions(**{**settings, **switch})) < mean_loss(
        RoundingOptions(**settings)
    )


def test_all_switches_together_lose_far_less_than_the_plain_one_and_that_less_than_rounding():
    rounded = []
    for seed in range(0, 800, 100):
        weight, x = weight_of(seed), correlated(seed)
        nearest = rtn.quantize(weight, INT4).dequantize(torch.float32)
        rounded.append(((weight - nearest) @ x.T).square().sum().log())
    assert mean_loss(PLAIN) < 0.7 * float(torch.stack(rounded).mean().exp())
    assert mean_loss(RoundingOptions()) < 0.7 * mean_loss(PLAIN)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, -1])
def test_refining_never_raises_what_it_minimises(size, symmetric):
    weight, x = weight_of(), correlated()
    scheme = Scheme(kind="int4", group_size=size, symmetric=symmetric)
    hessian = (x.T @ x).double()
    hessian.diagonal().add_(INPUTS / (2 * TOKENS) * hessian.diagonal().mean())
    losses = []
    for rounds in range(5):
        solution = solve(weight, moments_of(x), scheme, RoundingOptions(refine=rounds))
        change = weight.double() - solution.weight.dequantize(torch.float32).double()
        losses.append(((change @ hessian) * change).sum(1))
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert losses[-1].sum() < 0.99 * losses[0].sum()


@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("size", [-1, 32, 64, 128])
def test_every_scheme(kind, symmetric, size):
    weight, x = weight_of(inputs=256), correlated(inputs=256)
    scheme = Scheme(kind=kind, group_size=size, symmetric=symmetric)
    solution = solve(weight, moments_of(x), scheme, RoundingOptions())
    found = solution.weight
    assert found.bits == (4 if kind == "int4" else 8)
    assert (found.shape, found.scheme) == ((OUTPUTS, 256), scheme)
    assert found.scales.dtype == torch.float16
    exact = x @ weight.T
    direct = float((x @ found.dequantize(torch.float32).T - exact).norm() / exact.norm())
    # float32 sums of 1024 products, from which the damping's share is taken away
    assert solution.output_error == pytest.approx(direct, rel=0.02)
    nearest = rtn.quantize(weight, scheme).dequantize(torch.float32)
    assert direct < 0.8 * float((x @ nearest.T - exact).norm() / exact.norm())
    # Act-order stays within the file's plain order of inputs.
    assert found.perm is None
    groups = layout.pack(found, "w")["w.g_idx"]
    assert groups.tolist() == [k // (256 if size == -1 else size) for k in range(256)]


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_asymmetric_zeros_are_those_that_a_v1_file_can_hold(shift):
    weight, x = weight_of() + shift, correlated()
    scheme = Scheme(kind="int4", group_size=32, symmetric=False)
    zeros = solve(weight, moments_of(x), scheme, RoundingOptions()).weight.zeros
    assert int(zeros.min()) >= 1
    assert int(zeros.max()) <= 15
    if shift:
        assert zeros.unique().tolist() == [{1: 1, -1: 15}[shift]]


@pytest.mark.parametrize(
    ("coupling", "raised", "damping"),
    [(0.9, 0, 0.002), (1.01, 1, 0.02), (1.1, 2, 0.2), (2, 3, 2), (15, 4, 20)],
)
def test_damping_is_raised_until_the_sum_can_be_factored(coupling, raised, damping):
    hessian = torch.eye(INPUTS)
    hessian[3, 70] = hessian[70, 3] = coupling
    solution = solve(weight_of(), with_hessian(hessian), options=RoundingOptions())
    assert (solution.raised, solution.fallback) == (raised, None)
    assert solution.damping == pytest.approx(damping)
    assert bool(solution.weight.dequantize().isfinite().all())


def nearest_codes(weight, found):
    scale = found.scales.float().repeat_interleave(found.group_inputs, 1)
    return torch.clamp((weight / scale).round(), -8, 7) + 8


@pytest.mark.parametrize("reason", ["not positive definite", "fewer than 8 tokens"])
@pytest.mark.parametrize("crossed", [False, True])
def test_a_sum_that_says_nothing_is_given_up_and_the_weight_rounded_to_nearest(reason, crossed):
    weight = weight_of()
    if reason.startswith("not"):
        hessian = torch.eye(INPUTS)
        hessian[3, 70] = hessian[70, 3] = 100
        moments = with_hessian(hessian)
        if crossed:
            moments.cross = torch.ones(INPUTS, INPUTS)
    else:
        x = correlated(tokens=7)
        moments = moments_of(x, exact=2 * x if crossed else None)
    solution = solve(weight, moments, options=RoundingOptions())
    assert solution.fallback == reason
    assert (solution.damping, solution.raised, solution.output_error) == (None, 0, None)
    found = solution.weight
    assert torch.equal(codes_of(found).float(), nearest_codes(weight, found))
    searched = rtn.quantize(weight, INT4, search=True)
    errors = [
        float((one.dequantize(torch.float32) - weight).square().sum()) for one in (found, searched)
    ]
    assert errors[0] <= errors[1]


def test_a_weight_that_no_token_reached():
    solution = solve(weight_of(), Moments(INPUTS, CPU, crossed=False), options=RoundingOptions())
    assert solution.fallback == "fewer than 8 tokens"
    assert bool(solution.weight.dequantize().isfinite().all())


def test_the_damping_is_the_larger_the_fewer_inputs_there_are():
    assert gptq.damping_of(4096, 4096, 0.002) == 0.5
    assert gptq.damping_of(4096, 256, 0.002) == 8
    assert gptq.damping_of(4096, 1e9, 0.002) == 0.002


def test_an_input_that_is_never_seen_harms_nothing():
    weight, x = weight_of(), correlated()
    x[:, [0, 40]] = 0
    solution = solve(weight, moments_of(x), options=RoundingOptions())
    assert solution.fallback is None
    nearest = rtn.quantize(weight, INT4).dequantize(torch.float32)
    assert float(loss(weight, solution, x).sum()) < float(((weight - nearest) @ x.T).square().sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad):
    weight, x = weight_of(), correlated()
    broken = weight.clone()
    broken[3, 4] = bad
    with pytest.raises(CheckpointError, match=r"^g: v: NaN or infinity in the weight$"):
        gptq.solve(
            torch.stack([weight, broken]), [moments_of(x), moments_of(x)], INT4, PLAIN,
            where=["f: w", "g: v"],
        )  # fmt: skip
    x[7, 8] = bad
    with pytest.raises(
        CheckpointError, match=r"^f: w: NaN or infinity in the sum over its inputs$"
    ):
        solve(weight, moments_of(x))


@pytest.mark.parametrize("options", [PLAIN, RoundingOptions()], ids=["plain", "all"])
def test_weights_beyond_float16_scales_are_named(options):
    weight, x = weight_of(), correlated()
    broken = weight.clone()
    broken[3, 4] = 1e6
    with pytest.raises(CheckpointError, match=r"^g: v: weights too large.*scales below 65504"):
        gptq.solve(
            torch.stack([weight, broken]), [moments_of(x), moments_of(x)], INT4, options,
            where=["f: w", "g: v"],
        )  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", [PLAIN, RoundingOptions()], ids=["plain", "all"])
def test_zeros_stay_zeros(symmetric, options):
    scheme = Scheme(kind="int4", group_size=32, symmetric=symmetric)
    x = correlated()
    found = solve(torch.zeros(OUTPUTS, INPUTS), moments_of(x), scheme, options)
    assert not found.weight.dequantize().any()
    assert found.output_error == 0
    weight = weight_of()
    weight[5] = 0
    weight[:, 32:64] = 0
    found = solve(weight, moments_of(x), scheme, options)
    assert not found.weight.dequantize()[5].any()
    assert bool(found.weight.dequantize().isfinite().all())
    nearest = rtn.quantize(weight, scheme).dequantize(torch.float32)
    assert float(loss(weight, found, x).sum()) < float(((weight - nearest) @ x.T).square().sum())


def test_fitted_to_its_own_outputs_the_target_is_the_weight():
    weight, x = weight_of(), correlated()
    alone = solve(weight, moments_of(x), options=RoundingOptions())
    fitted = solve(weight, moments_of(x, exact=x), options=RoundingOptions())
    same = codes_of(alone.weight) == codes_of(fitted.weight)
    assert same.float().mean() > 0.97  # a target off by 1e-6 rounds now and then otherwise
    assert fitted.output_error == pytest.approx(alone.output_error, rel=0.02)


def test_fitted_to_other_outputs_it_comes_closer_to_them():
    weight, exact = weight_of(), correlated()
    x = exact + 0.1 * correlated(5)
    losses = []
    for moments in (moments_of(x), moments_of(x, exact=exact)):
        found = solve(weight, moments, options=RoundingOptions()).weight.dequantize(torch.float32)
        losses.append(float((x @ found.T - exact @ weight.T).square().sum()))
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("options", [PLAIN, RoundingOptions()], ids=["plain", "all"])
def test_a_batch_is_its_matrices_one_at_a_time(options):
    weights = torch.stack([weight_of(seed) for seed in range(3)])
    inputs = [correlated(seed, tokens=tokens) for seed, tokens in enumerate((512, 4, 700))]
    names = [f"f: w{index}" for index in range(3)]
    together = gptq.solve(weights, [moments_of(x) for x in inputs], INT4, options, where=names)
    for weight, x, (one,) in zip(weights, inputs, together, strict=True):
        alone = solve(weight, moments_of(x), options=options)
        assert (one.fallback, one.damping) == (alone.fallback, alone.damping)
        assert (codes_of(one.weight) == codes_of(alone.weight)).float().mean() > 0.995
        if one.output_error is not None:
            assert one.output_error == pytest.approx(alone.output_error, rel=1e-3)
    assert together[1][0].fallback


def test_stacked_matrices_come_back_apart():
    x, parts = correlated(), [weight_of(1, 16), weight_of(2, 8), weight_of(3, 40)]
    ((*found,),) = gptq.solve(
        torch.cat(parts)[None],
        [moments_of(x)],
        INT4,
        RoundingOptions(),
        where=["f"],
        parts=[16, 8, 40],
    )
    assert [one.weight.shape[0] for one in found] == [16, 8, 40]
    for weight, one in zip(parts, found, strict=True):
        alone = solve(weight, moments_of(x), options=RoundingOptions())
        assert (codes_of(one.weight) == codes_of(alone.weight)).float().mean() > 0.995
        assert one.output_error == pytest.approx(alone.output_error, rel=1e-3)


def test_trials_in_slabs_are_trials_at_once(monkeypatch):
    weight, x = weight_of(), correlated()
    whole = solve(weight, moments_of(x), options=RoundingOptions())
    monkeypatch.setitem(gptq_group._TRIAL_ELEMENTS, "cpu", 7 * 8 * INPUTS)
    slabs = solve(weight, moments_of(x), options=RoundingOptions())
    assert (codes_of(slabs.weight) == codes_of(whole.weight)).float().mean() > 0.995


def test_the_same_twice():
    weight, x = weight_of(), correlated()
    first, second = (
        solve(weight, moments_of(x), options=RoundingOptions()).weight for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_sums_count_each_input_by_its_share():
    x, exact = correlated(tokens=60), correlated(3, tokens=60)
    token_weights = torch.rand(60, generator=torch.Generator().manual_seed(1))
    moments = Moments(INPUTS, CPU, crossed=True)
    moments.add(
        x[:40].view(2, 20, INPUTS), token_weights[:40], exact=exact[:40].view(2, 20, INPUTS)
    )
    moments.add(x[40:], token_weights[40:], exact=exact[40:])
    assert moments.tokens == 60
    assert torch.allclose(
        moments.hessian, x.T @ torch.diag(token_weights) @ x, rtol=1e-4, atol=1e-2
    )
    assert torch.allclose(
        moments.cross, exact.T @ torch.diag(token_weights) @ x, rtol=1e-4, atol=1e-2
    )
    assert moments.samples == pytest.approx(
        float(token_weights.sum() ** 2 / token_weights.square().sum())
    )
    assert Moments(4, CPU, crossed=False).samples == 0
    assert moments_of(x).samples == 60
    assert moments_of(x, token_weights=torch.full((60,), 0.3)).samples == pytest.approx(60)
    one = torch.zeros(60)
    one[0] = 1
    assert moments_of(x, token_weights=one).samples == pytest.approx(1)


def test_a_copy_of_sums_is_independent():
    x = correlated(tokens=16)
    moments = moments_of(x, exact=x)
    copy = moments.copy()
    assert torch.equal(copy.hessian, moments.hessian)
    assert torch.equal(copy.cross, moments.cross)
    before = copy.hessian.clone(), copy.cross.clone(), copy.tokens, copy.samples
    moments.add(x, exact=x)
    moments.hessian.zero_()
    moments.cross.zero_()
    assert torch.equal(copy.hessian, before[0])
    assert torch.equal(copy.cross, before[1])
    assert (copy.tokens, copy.samples) == before[2:]
