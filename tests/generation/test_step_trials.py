"""Trials of a decode step, with kernels left out on meta and a step that is made up."""

import pytest
import torch

pytest.importorskip("triton")

from qmix.config import MixtralConfig
from qmix.evals.timing import random_model
from qmix.generation import step_trials
from qmix.generation.step_trials import StepTrials
from qmix.kernels.gpu import launch
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.tuning import axes
from qmix.tuning.search import DeviceLostError

OTHER = StepTuning(merge_in_split=False)
assert OTHER != axes.SEPARATE


class Clock:
    """A step takes as many microseconds as `cost` says."""

    def __init__(self):
        self.costs = {UNTUNED: 100.0, OTHER: 80.0}
        self.now = None

    def synchronize(self):
        pass

    def microseconds(self, run):
        run()
        return 8 * self.costs[self.now]


class Decoder:
    """Stands for a StaticDecoder: what a step computes is made up by `logits`."""

    def __init__(self, model, head, cache, *, record, tuning, rotary):
        assert len(model.layers) == 4
        assert len(cache) == 4
        self.tuning, self.length = tuning, 0
        Decoder.clock.now = tuning
        Decoder.recorded.append(record)

    def seek(self, length):
        self.length = length

    def step(self, ids):
        self.length += 1
        return Decoder.logits(self.tuning, self.length)


@pytest.fixture
def trials(monkeypatch):
    config = MixtralConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = random_model.build_random_model(config, random_model.NF4, torch.device("cpu"))
    monkeypatch.setattr(step_trials, "StaticDecoder", Decoder)
    Decoder.clock, Decoder.recorded = Clock(), []
    Decoder.logits = staticmethod(lambda tuning, length: torch.full((2, 64), float(length)))
    before = torch.get_rng_state()
    made = StepTrials(model.model, model.lm_head, 2, Decoder.clock)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(model.model.layers) == 6
    return made


def test_the_median_of_a_step_and_no_difference(trials):
    assert trials.measure(UNTUNED) == step_trials.Outcome(100.0, 0.0)
    assert trials.measure(OTHER) == step_trials.Outcome(80.0, 0.0)


@pytest.mark.parametrize(("wrong_from", "difference"), [(57, 0.5), (64, 0.0)])
def test_a_difference_is_that_of_the_worst_row_in_most_steps(trials, wrong_from, difference):
    """A near tie of two experts may fall otherwise now and then; a wrong kernel is always wrong."""

    def logits(tuning, length):
        found = torch.full((2, 64), float(length))
        if tuning == OTHER and length >= wrong_from:
            found[1] *= 1.5
        return found

    Decoder.logits = staticmethod(logits)
    trials.measure(UNTUNED)
    assert trials.measure(OTHER).difference == pytest.approx(difference)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_infinitely_far(trials, value):
    Decoder.logits = staticmethod(lambda tuning, length: torch.full((2, 64), value))
    with pytest.raises(RuntimeError, match="other bits") if value != value else _nothing():
        assert trials.measure(UNTUNED).difference == float("inf")


def test_other_bits_a_second_time_are_an_error(trials):
    calls = iter(range(1000))
    Decoder.logits = staticmethod(lambda tuning, length: torch.full((2, 64), float(next(calls))))
    with pytest.raises(RuntimeError, match="other bits"):
        trials.measure(UNTUNED)


def test_an_error_is_told_apart_from_a_lost_device(trials, monkeypatch):
    def logits(tuning, length):
        raise ValueError("out of resource: shared memory")

    Decoder.logits = staticmethod(logits)
    with pytest.raises(ValueError, match="shared memory"):
        trials.measure(UNTUNED)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Decoder.clock, "synchronize", lost)
    with pytest.raises(DeviceLostError) as error:
        trials.measure(UNTUNED)
    assert "shared memory" in str(error.value.__cause__)


class Kernel:
    """Stands for a kernel that may fail to compile."""

    def __init__(self, fails=False):
        self.fails, self.warm, self.started = fails, [], 0

    def warmup(self, *arguments, grid, **constants):
        self.warm.append((grid, constants["WARPS"]))
        if self.fails:
            raise ValueError("too many registers")

    def __getitem__(self, grid):
        self.started += 1
        return lambda *_, **__: None


@pytest.mark.parametrize("fails", [False, True])
def test_all_candidates_are_compiled_ahead_and_none_is_launched(trials, fails):
    kernel = Kernel(fails)

    def logits(tuning, length):
        launch.launch(kernel, (3,), torch.ones(1), WARPS=tuning.merge_in_split)
        return torch.full((2, 64), float(length))

    Decoder.logits = staticmethod(logits)
    trials.prepare([UNTUNED, OTHER])
    assert [warps for _, warps in kernel.warm] == [True, False]
    assert kernel.started == 0
    assert Decoder.recorded == [False, False]
    trials.measure(UNTUNED)
    assert (len(kernel.warm), kernel.started) == (2, (1 + 1 + 5 + 1) * 8)


def _nothing():
    from contextlib import nullcontext

    return nullcontext()
