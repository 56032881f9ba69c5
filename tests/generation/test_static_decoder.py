"""The decode step without a GPU: interpreted, and at full size on meta, which has no values."""

from dataclasses import replace

import pytest
import torch

from qmix import kernels
from qmix.config import MixtralConfig
from qmix.generation import cuda_graph
from qmix.generation.sampling import Sampling
from qmix.generation.token_selector import SampleFn
from qmix.weights.dense import Dense
from tests.support.interpreter import Recorder, run_apart
from tests.support.soak import both

pytest.importorskip("triton")

from qmix.evals.timing import random_model
from qmix.generation.packed_layers import supported
from qmix.generation.static_decoder import StaticDecoder
from qmix.kernels import dense
from qmix.kernels.gpu import (
    attention_triton,
    attention_tuning,
    fused_triton,
    moe_triton,
    pointwise_triton,
)
from qmix.kernels.gpu.grid import Tuning
from qmix.kernels.gpu.step_tuning import UNTUNED, StepTuning
from qmix.nn.cache_rows import CacheRows
from qmix.nn.cache_slab import CacheSlab


@pytest.mark.slow
@both
def test_steps_in_the_interpreter(soak):
    run_apart("decoding", "fused", "steps", interpreted=True, soak=soak)


@pytest.mark.gpu
def test_steps_on_the_gpu():
    run_apart("decoding", "fused", interpreted=False)


@pytest.fixture
def launches(monkeypatch):
    """Every kernel recorded instead of launched, by name."""
    monkeypatch.setitem(kernels._LINEAR, (Dense, "meta"), dense.linear)  # the head's
    found = {}
    for module in (moe_triton, attention_triton, pointwise_triton, fused_triton):
        for name in dir(module):
            if hasattr(getattr(module, name), "arg_names") and not name.startswith("_"):
                found[name] = Recorder()
                monkeypatch.setattr(module, name, found[name])
    return found


def test_the_same_padding_is_not_read_again():
    decoder = object.__new__(StaticDecoder)
    decoder._padding, decoder._mask = torch.zeros(2, dtype=torch.int32), None
    whole = torch.ones(2, 8, dtype=torch.bool)
    whole[1, :3] = False
    decoder.set_padding(whole[:, :4])
    assert decoder._padding.tolist() == [0, 3]
    decoder._padding.fill_(7)
    decoder.set_padding(whole[:, :5])
    assert decoder._padding.tolist() == [7, 7]
    for other in (whole[:, :5].clone(), whole[:, 1:5], whole.index_fill_(1, torch.tensor([0]), 0)):
        decoder._padding.fill_(7)
        decoder.set_padding(other)
        assert decoder._padding.tolist() == (~other).sum(1).tolist()


GREEDY = SampleFn(Sampling(), None)


def step_of(batch, sample_fn=GREEDY, tuning=UNTUNED, **changes):
    config = MixtralConfig(**changes)
    model = random_model.build_random_model(config, random_model.NF4, torch.device("meta"))
    assert supported(model.model)
    cache = model.new_cache(batch, 4096)
    return StaticDecoder(
        model.model, model.lm_head, cache, padded=True, sample_fn=sample_fn, tuning=tuning
    )


SEPARATE = StepTuning(merge_in_split=False, rotate_in_qkv=False, norm_in_products=False)


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


ONE_LAUNCH_EACH = {
    "matmul_rotate_store": 32,
    "split": 32,
    "matmul_add_route": 32,
    "gate_up": 32,
    "down_add": 32,
    "start_norm": 1,
    "residual_norm": 1,
}


@pytest.mark.parametrize("batch", [1, 8, 16])
def test_a_token_of_the_8x7b_is_five_launches_a_layer(batch, launches):
    assert step_of(batch).step().shape == (batch, 32000)
    assert counted(launches) == ONE_LAUNCH_EACH


@pytest.mark.parametrize(
    ("choice", "launches_a_layer"),
    [("merge_in_split", 8), ("rotate_in_qkv", 8), ("norm_in_products", 9)],
)
def test_every_choice_by_itself(choice, launches_a_layer, launches):
    """The norms' choice goes with the rotation's only."""
    step_of(1, tuning=replace(SEPARATE, **{choice: True})).step()
    assert sum(counted(launches).values()) == launches_a_layer * 32 + 1


@pytest.mark.parametrize(("batch", "changes"), [(17, {}), (1, {"num_attention_heads": 64})])
def test_where_no_panel_is_a_head_or_tokens_are_many_norms_stay_launches(batch, changes, launches):
    step_of(batch, **changes).step()
    assert counted(launches)["rotate_store"] == 32
    assert counted(launches)["residual_norm"] == 2 * 32 + 1


@pytest.mark.parametrize("base", [UNTUNED, SEPARATE], ids=["fused", "separate"])
def test_every_choice_reaches_its_launch(base, launches):
    """Each product its own warps and stages, attention its own columns and blocks."""
    tuning = replace(
        base,
        qkv=Tuning(warps=1, stages=2),
        o_proj=Tuning(warps=2, stages=5),
        gate_up=Tuning(warps=4, stages=6),
        down=Tuning(warps=1, stages=7),
        attention=attention_tuning.Tuning(columns=32, stages=3, blocks_per_sm=9),
    )
    step_of(1, tuning=tuning, num_hidden_layers=1).step()
    shapes = {
        name: [(each.get("WARPS"), each["STAGES"]) for each in recorder.constants]
        for name, recorder in launches.items()
        if any("STAGES" in each for each in recorder.constants)
    }
    fused = ("matmul_rotate_store", "matmul_add_route", "down_add")
    products = dict(zip(fused, ([(1, 2)], [(2, 5)], [(1, 7)]), strict=True))
    if not tuning.rotate_in_qkv:
        products = {"packed_matmul": [(1, 2), (2, 5)], "down": [(1, 7)]}
    assert shapes == {**products, "gate_up": [(4, 6)], "split": [(None, 3)]}
    assert launches["split"].constants[0]["COLUMNS"] == 32
    few = launches["split"].grids[-1]
    step_of(1, num_hidden_layers=1).step()
    assert few[1] > launches["split"].grids[-1][1]


@pytest.mark.parametrize("can", [True, False])
def test_launches_depend_where_a_card_can(can, launches, monkeypatch):
    """Off unless chosen; the launches that follow torch's own are plain ones."""
    monkeypatch.setattr("qmix.generation.layer_launches.can_depend", lambda device: can)

    def dependent(tuning):
        for recorder in launches.values():
            recorder.constants.clear()
        step_of(1, tuning=tuning, num_hidden_layers=1).step()
        return {
            name: each.get("PREFETCH")
            for name, recorder in launches.items()
            for each in recorder.constants
            if "launch_pdl" in each
        }

    assert dependent(UNTUNED) == {}
    plain = {"split": None, "gate_up": None, "down_add": None}
    chosen = {"matmul_rotate_store": True, "matmul_add_route": True, **plain}
    assert dependent(StepTuning(dependent=True, prefetch=True)) == (chosen if can else {})


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


class Recorded:
    """Stands for a CUDA graph of launches."""

    def __init__(self, launch):
        self.replay = launch


@pytest.fixture
def recordings(launches, monkeypatch):
    """Every recording that is made, on meta tensors, as (generator, pool)."""
    found = []

    def record(launch, changed, generator, pool=None):
        found.append((generator, pool))
        return Recorded(launch)

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr("qmix.generation.static_decoder._recordable", lambda device: True)
    monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    return found


def meta_model(**changes):
    config = MixtralConfig(num_hidden_layers=1, **changes)
    return random_model.build_random_model(config, random_model.NF4, torch.device("meta"))


def reply(model, cache, seed, temperature=0.7):
    """One sampled step after the first column, as the loop takes it, and a plain one before."""
    generator = model.static_decoders.generator(cache, torch.device("cpu"), seed)
    draw = SampleFn(Sampling(temperature=temperature), generator)
    with torch.no_grad():
        column = torch.zeros(1, 1, dtype=torch.long, device="meta")
        model.next_logits(column, cache)
        for_cache = model.static_decoders.for_cache
        decoder = for_cache(model.model, model.lm_head, cache, None, draw)
        decoder.step(column)
        cache.advance(1)
    return decoder, generator.get_state()


@pytest.fixture
def ungenerated(monkeypatch):
    """Noise on meta tensors, which take no CPU's generator."""
    monkeypatch.setattr(Sampling, "sample", lambda self, scores, generator: scores.argmax(-1))


@pytest.mark.usefixtures("ungenerated")
def test_seeded_replies_share_one_recording(recordings):
    """The generator is seeded in place; another temperature is another recording."""
    model = meta_model()
    cache = model.new_cache(1, 256)
    first, state = reply(model, cache, seed=1)
    again, other_state = reply(model, cache, seed=2)
    assert again is first
    assert not torch.equal(state, other_state)
    assert torch.equal(reply(model, cache, seed=1)[1], state)
    assert [generator is None for generator, _ in recordings] == [True, False]
    assert reply(model, cache, seed=1, temperature=0.8)[0] is not first
    assert len(recordings) == 3


@pytest.mark.usefixtures("ungenerated")
def test_decoders_of_a_model_share_the_rotary_tables(recordings):
    model = meta_model(max_position_embeddings=512)
    one, _ = reply(model, model.new_cache(1, 64), seed=1)
    two, _ = reply(model, model.new_cache(1, 128), seed=1)
    assert two is not one
    assert two._cos is one._cos
    longer, _ = reply(model, model.new_cache(1, 600), seed=1)
    assert longer._cos.shape[2] == 601
    assert reply(model, model.new_cache(1, 64), seed=1)[0]._cos is longer._cos


def test_rows_of_a_slab_are_recorded_once_for_each_number_of_them(recordings):
    """However they join and leave; a prompt of which one id is left takes the step of one row."""
    model = meta_model()
    slab = CacheSlab(model.config, 3, 64, dtype=model.dtype, device=model.device)
    a, b, c = slab.rows
    for rows in ([a], [b], [c, a], [a, b, c], [c, b], [c], [b, a, c]):
        ids = torch.zeros(len(rows), 1, dtype=torch.long, device="meta")
        model.next_logits(ids, CacheRows(rows))
    model.next_logits(torch.zeros(1, 1, dtype=torch.long, device="meta"), b)
    assert len(recordings) == 3
    assert [row.length for row in (a, b, c)] == [4, 5, 5]
    pools = [pool for _, pool in recordings]
    assert pools == [pools[0]] * 3


def test_a_request_that_counts_experts_leaves_its_neighbours_their_recording(recordings):
    model = meta_model()
    slab = CacheSlab(model.config, 3, 64, dtype=model.dtype, device=model.device)
    a, b, _ = slab.rows
    ids = torch.zeros(2, 1, dtype=torch.long, device="meta")
    model.next_logits(ids, CacheRows([a, b]))
    logits, use = model.next_logits_with_experts(ids, CacheRows([b, a]))
    assert (logits.shape, use.shape) == ((2, 32000), (1, 2, 8))
    assert len(recordings) == 1
    assert [row.length for row in (a, b)] == [2, 2]


def test_a_step_made_in_inference_mode_runs_outside_of_it(recordings):
    model = meta_model()
    cache = model.new_cache(1, 64)
    column = torch.zeros(1, 1, dtype=torch.long, device="meta")
    with torch.inference_mode():
        model.next_logits(column, cache)
    model.next_logits(column, cache)
    assert len(recordings) == 1


def test_a_step_that_cannot_be_recorded_warns_once_and_is_launched(launches, monkeypatch):
    monkeypatch.setattr("qmix.generation.static_decoder._recordable", lambda device: True)

    def record(*_):
        raise cuda_graph.RecordingError("operation not permitted")

    monkeypatch.setattr(cuda_graph, "record", record)
    step = step_of(1, num_hidden_layers=1)
    with pytest.warns(UserWarning, match="operation not permitted"):
        step.step()
    for recorder in launches.values():
        recorder.grids.clear()
    step.step()  # warnings are errors here
    assert counted(launches)["gate_up"] == 1
