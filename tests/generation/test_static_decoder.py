"""The decode step without a GPU: interpreted, and at full size on meta, which has no values."""

import pytest
import torch

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.generation.sampling import Sampling
from qmix.generation.token_selector import SampleFn
from qmix.weights.dense import Dense
from tests.support.interpreter import Recorder, run_apart
from tests.support.soak import both

pytest.importorskip("triton")

from qmix.evals.timing import random_model
from qmix.generation.static_decoder import StaticDecoder, supported
from qmix.kernels import dense
from qmix.kernels.gpu import attention_triton, moe_triton, pointwise_triton
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning


@pytest.mark.slow
@both
def test_steps_in_the_interpreter(soak):
    run_apart("decoding", "steps", interpreted=True, soak=soak)


@pytest.mark.gpu
def test_steps_on_the_gpu():
    run_apart("decoding", interpreted=False)


@pytest.fixture
def launches(monkeypatch):
    """Every kernel recorded instead of launched, by name."""
    monkeypatch.setitem(kernels._LINEAR, (Dense, "meta"), dense.linear)  # the head's
    found = {}
    for module in (moe_triton, attention_triton, pointwise_triton):
        for name in dir(module):
            if hasattr(getattr(module, name), "arg_names") and not name.startswith("_"):
                found[name] = Recorder()
                monkeypatch.setattr(module, name, found[name])
    return found


GREEDY = SampleFn(Sampling(), None)


def step_of(batch, sample_fn=GREEDY, tuning=UNTUNED, **changes):
    config = MixtralConfig(**changes)
    model = random_model.build_random_model(config, random_model.NF4, torch.device("meta"))
    assert supported(model.model)
    cache = model.new_cache(batch, 4096)
    return StaticDecoder(
        model.model, model.lm_head, cache, padded=True, sample_fn=sample_fn, tuning=tuning
    )


SEPARATE = StepTuning(merge_in_split=False)


def counted(launches):
    return {name: len(recorder.grids) for name, recorder in launches.items() if recorder.grids}


@pytest.mark.parametrize("batch", [1, 8, 16])
def test_a_token_of_the_8x7b_is_nine_separate_launches_a_layer(batch, launches):
    """On meta tensors reading a value on the host raises, and every shape is known before."""
    step = step_of(batch, tuning=SEPARATE)
    logits = step.step()
    assert logits.shape == (batch, 32000)
    counts = counted(launches)
    assert counts == {
        "residual_norm": 2 * 32 + 1,
        "packed_matmul": 2 * 32,
        "rotate_store": 32,
        "split": 32,
        "merge": 32,
        "gate_up": 32,
        "down": 32,
    }
    assert sum(counts.values()) == 9 * 32 + 1
    with pytest.raises(RuntimeError):
        step.past.tolist()  # the trap is armed


def test_the_last_split_saves_a_launch_a_layer(launches):
    step_of(1).step()
    assert "merge" not in counted(launches)
    assert sum(counted(launches).values()) == 8 * 32 + 1


def test_what_torch_launches_beside_the_kernels(launches, monkeypatch):
    """A handful for the embedding and the head; per layer only empty tensors."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    step = step_of(1)
    with Counted() as counted:
        step.step()
    free = ("aten.empty", "aten.view", "aten.select", "aten.unbind", "aten.transpose", "aten.detach",
            "aten.new_empty", "aten._unsafe_view", "aten.t.", "aten.unsqueeze", "aten.alias",
            "aten.slice", "aten.as_strided", "aten.permute", "aten.expand", "aten.lift_fresh")  # fmt: skip
    launched = [name for name in counted.names if not name.startswith(free)]
    assert len(launched) <= 16, launched


def test_shapes_do_not_depend_on_the_position(launches):
    step = step_of(2, num_hidden_layers=1)
    step.step()
    first = {name: list(recorder.grids) for name, recorder in launches.items()}
    step.seek(3000)
    for recorder in launches.values():
        recorder.grids.clear()
    step.step()
    assert {name: recorder.grids for name, recorder in launches.items()} == first


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05)], ids=str
)
def test_choosing_is_part_of_the_step_and_reads_nothing_back(sampling, launches):
    step = step_of(4, SampleFn(sampling, None), num_hidden_layers=1)
    step.step()
    assert step.ids.shape == (4,)
    assert step.scores.shape == (4, 32000)
