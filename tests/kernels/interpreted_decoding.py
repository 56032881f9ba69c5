"""One decode step of a packed model against the reference, in Triton's interpreter or on a GPU.

Run by tests/generation/test_static_decoder.py in a process of its own with TRITON_INTERPRET=1.
Tolerance: the kernels' own (tests/kernels/interpreted_experts.py); tokens must be equal.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qmix import kernels
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import generate
from qmix.generation.packed_layers import supported
from qmix.generation.sampling import Sampling
from qmix.generation.static_decoder import StaticDecoder
from qmix.generation.static_decoders import StaticDecoders
from qmix.generation.token_selector import SampleFn
from qmix.kernels.gpu import packed_matmul
from qmix.kernels.gpu.step_tuning import StepTuning
from qmix.models.pack import Packer
from qmix.nn.cache_rows import CacheRows
from qmix.nn.cache_slab import CacheSlab
from qmix.nn.linear import Linear
from tests.support.interpreter import CONVERSIONS, DEVICE, INTERPRETED, error, skip_without_a_device
from tests.support.models import small_model
from tests.support.packed import act_order, int4, nf4
from tests.support.soak import one_in

skip_without_a_device()
BOUND = 5e-3

pytestmark = CONVERSIONS


def packed_model(make, dense=(), **changes):
    widths = {"hidden_size": 128, "intermediate_size": 64, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = small_model(**{**widths, **heads, "num_hidden_layers": 2, **changes})
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, Linear) and not name.endswith(("gate", "lm_head", *dense)):
            module.store(make(module.out_features, module.in_features, seed))
    model.to(DEVICE)
    packer = Packer()
    packer.pack(model)
    assert packer.complete
    assert supported(model.model)
    return model


@pytest.fixture(autouse=True)
def on_the_cpu_too(monkeypatch):
    monkeypatch.setitem(kernels._LINEAR, (kernels.PackedWeight, "cpu"), packed_matmul.linear)


def reference_steps(model, prompt, attention_mask, count):
    """Greedy ids and logits, by the standard weights and a cache of their own."""
    cache, ids, found = model.new_cache(len(prompt), 32), prompt, []
    with kernels.override("reference"), torch.no_grad():
        for _ in range(count):
            positions = (
                None
                if attention_mask is None
                else (attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            )
            hidden = model.model.decode(
                model.model.embed(ids),
                padding_mask=attention_mask,
                position_ids=positions,
                cache=cache,
            ).hidden
            found.append(model.lm_head(hidden[:, -1]).float())
            ids = found[-1].argmax(-1, keepdim=True)
            if attention_mask is not None:
                attention_mask = torch.cat(
                    (attention_mask, torch.ones_like(attention_mask[:, :1])), 1
                )
    return found


def prefilled(model, prompt, attention_mask, capacity=32):
    cache = model.new_cache(len(prompt), capacity)
    positions = None if attention_mask is None else (attention_mask.cumsum(1) - 1).clamp(min=0)
    with kernels.override("reference"), torch.no_grad():
        model.model.decode(
            model.model.embed(prompt),
            padding_mask=attention_mask,
            position_ids=positions,
            cache=cache,
        )
    return cache


PROMPT = torch.tensor([[3, 17, 90, 41, 8], [5, 9, 11, 77, 21]])


@pytest.mark.parametrize(("window", "norms"), [(4, False), (None, True)])
def test_a_cache_in_8_bits_is_written_and_read_by_the_step(window, norms):
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    model = packed_model(nf4, sliding_window=window, num_hidden_layers=1, **heads)
    model.model.kv = "int8"
    expected = reference_steps(model, PROMPT.to(DEVICE), None, 3)
    cache = prefilled(model, PROMPT.to(DEVICE), None)
    tuning = StepTuning(rotate_in_qkv=norms, norm_in_products=norms)
    step = StaticDecoder(model.model, model.lm_head, cache, tuning=tuning)
    for before, after in pairwise(expected):
        logits = step.step(before.argmax(-1))
        cache.advance(1)
        assert error(logits, after) <= 4 * BOUND  # a code more or less where a rounding decides


@pytest.mark.diagonal
@pytest.mark.parametrize("make", [nf4, int4, act_order])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_the_reference(make, window, padded):
    layers = 2 if make is nf4 else 1
    model = packed_model(make, sliding_window=window, num_hidden_layers=layers)
    prompt = PROMPT.to(DEVICE)
    attention_mask = torch.ones_like(prompt, dtype=torch.bool) if padded else None
    if padded:
        attention_mask[1, :2] = False
    expected = reference_steps(model, prompt, attention_mask, 3)
    cache = prefilled(model, prompt, attention_mask)
    step = StaticDecoder(model.model, model.lm_head, cache, padded=padded)
    if padded:
        step.set_padding(attention_mask)
    for before, after in pairwise(expected):
        logits = step.step(before.argmax(-1))
        cache.advance(1)
        assert torch.isfinite(logits).all()
        assert error(logits, after) <= BOUND
        assert torch.equal(logits.argmax(-1), after.argmax(-1))
    assert cache.length == 7
    assert step.past.tolist() == [7, 7]


@pytest.mark.parametrize("dense", one_in(2, [("v_proj", "o_proj"), ("v_proj",)]), ids=str)
def test_attention_that_is_not_packed_or_not_as_one_matrix(dense):
    model = packed_model(nf4, dense, num_hidden_layers=1, **HEADS_OF_128)
    prompt = PROMPT.to(DEVICE)
    expected = reference_steps(model, prompt, None, 2)
    cache = prefilled(model, prompt, None)
    step = StaticDecoder(model.model, model.lm_head, cache)
    for before, after in pairwise(expected):
        logits = step.step(before.argmax(-1))
        cache.advance(1)
        assert error(logits, after) <= BOUND
        assert torch.equal(logits.argmax(-1), after.argmax(-1))


HEADS_OF_128 = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}


@pytest.mark.parametrize("make", one_in(3, [nf4, int4, act_order]))
@pytest.mark.parametrize("window", one_in(2, [4, None]))
@pytest.mark.parametrize("padded", one_in(2, [True, False]))
@pytest.mark.parametrize("norms", one_in(2, [True, False]))
def test_fewer_launches_equal_the_reference(make, window, padded, norms):
    """Heads of 128, as Mixtral's are: with and without norms of their own launch."""
    model = packed_model(make, sliding_window=window, **HEADS_OF_128)
    prompt = PROMPT.to(DEVICE)
    attention_mask = torch.ones_like(prompt, dtype=torch.bool) if padded else None
    if padded:
        attention_mask[1, :2] = False
    expected = reference_steps(model, prompt, attention_mask, 3)
    cache = prefilled(model, prompt, attention_mask)
    tuning = StepTuning(norm_in_products=norms)
    step = StaticDecoder(model.model, model.lm_head, cache, padded=padded, tuning=tuning)
    if padded:
        step.set_padding(attention_mask)
    for before, after in pairwise(expected):
        logits = step.step(before.argmax(-1))
        cache.advance(1)
        assert error(logits, after) <= BOUND
        assert torch.equal(logits.argmax(-1), after.argmax(-1))


def reference_use(model, ids):
    """The experts of the last of these ids, (layers, E)."""
    text = torch.tensor([ids], device=DEVICE)
    with kernels.override("reference"), torch.no_grad():
        decoded = model.model.decode(model.model.embed(text), cache=model.new_cache(1, 32))
        return decoded.expert_use(model.config.num_experts_per_tok)[:, -1]


@pytest.mark.parametrize("window", one_in(2, [4, None]))
def test_rows_of_a_slab_are_decoded_together_as_each_alone(monkeypatch, window):
    """Rows join, leave and change places; the logits come in the order of the call."""
    monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    model = packed_model(nf4, num_hidden_layers=1, sliding_window=window)
    prompts = [[3, 17, 90, 41, 8], [5, 9], [7, 7, 7], [11, 12, 13, 14]]
    expected = [
        reference_steps(model, torch.tensor([ids], device=DEVICE), None, 4) for ids in prompts
    ]
    slab = CacheSlab(model.config, len(prompts), 32, dtype=model.dtype, device=torch.device(DEVICE))
    for row, ids in zip(slab.rows, prompts, strict=True):
        with kernels.override("reference"), torch.no_grad():
            model.model.decode(model.model.embed(torch.tensor([ids], device=DEVICE)), cache=row)
    steps = [0] * len(prompts)
    for together in ([2], [3, 2, 1], [1, 0], [0, 3, 2], [0]):
        newest = torch.stack([expected[n][steps[n]].argmax(-1) for n in together])
        rows = CacheRows([slab.rows[n] for n in together])
        if len(together) == 2:
            logits, use = model.next_logits_with_experts(newest, rows, rows.position_ids())
            for n, found in zip(together, use.unbind(1), strict=True):
                read = [int(after.argmax()) for after in expected[n][: steps[n] + 1]]
                assert torch.equal(found, reference_use(model, prompts[n] + read))
        else:
            logits = model.next_logits(newest, rows, None, rows.position_ids())
        for n, found in zip(together, logits, strict=True):
            steps[n] += 1
            after = expected[n][steps[n]][0]
            assert error(found[None], after[None]) <= BOUND
            assert found.argmax(-1) == after.argmax(-1)
            assert slab.rows[n].length == len(prompts[n]) + steps[n]
    (shared,) = model.static_decoders._by_cache.values()
    assert sorted(shared.decoders) == [(1, False), (2, False), (3, False)]


def test_the_step_can_choose_by_itself():
    model = packed_model(nf4, num_hidden_layers=1)
    expected = reference_steps(model, PROMPT.to(DEVICE), None, 3)
    cache = prefilled(model, PROMPT.to(DEVICE), None)
    step = StaticDecoder(model.model, model.lm_head, cache, sample_fn=SampleFn(Sampling(), None))
    step.ids.copy_(expected[0].argmax(-1))
    for after in expected[1:]:
        step.step()
        assert torch.equal(step.ids, after.argmax(-1))


def test_a_step_is_repeatable_and_can_go_back():
    model = packed_model(int4, num_hidden_layers=1)
    cache = prefilled(model, PROMPT.to(DEVICE), None)
    step = StaticDecoder(model.model, model.lm_head, cache)
    first = step.step(PROMPT[:, 0].to(DEVICE)).clone()
    step.step(PROMPT[:, 1].to(DEVICE))
    step.seek(5)
    assert torch.equal(step.step(PROMPT[:, 0].to(DEVICE)), first)


@pytest.mark.parametrize(
    "options",
    one_in(3, [{"do_sample": True, "top_k": 5, "seed": 3}, {}, {"repetition_penalty": 1.2}]),
    ids=str,
)
@pytest.mark.parametrize("padded", one_in(2, [True, False]))
def test_generate_takes_the_step(monkeypatch, options, padded):
    """Through the loop, with a cache that grows on the way: the reference's tokens.

    With the choice inside the step, or, where it needs the whole context, after it.
    """
    model = packed_model(nf4, num_hidden_layers=1)
    taken = []
    plain = StaticDecoder.step
    monkeypatch.setattr(
        StaticDecoder, "step", lambda self, ids=None: taken.append(1) or plain(self, ids)
    )
    if INTERPRETED:
        monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    mask = torch.ones_like(PROMPT)
    mask[0, :1] = int(not padded)
    config = GenerationConfig(max_new_tokens=3, **options)
    inputs = GenerationInputs(PROMPT.to(DEVICE), config, attention_mask=mask.to(DEVICE))
    with torch.no_grad():
        with kernels.override("reference"):
            expected = generate(model, inputs)
        assert not taken
        found = generate(model, replace(inputs, cache=model.new_cache(2, 6)))
    assert torch.equal(found, expected)
    assert len(taken) == 2


def test_a_model_that_is_not_packed_is_left_alone(monkeypatch):
    monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    model = small_model()
    with torch.no_grad():
        found = StaticDecoders().for_cache(model.model, model.lm_head, model.new_cache(1, 4), None)
    assert found is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "layers.1",
            "layers.1.self_attn",
            "layers.1.self_attn.v_proj",
            "layers.1.input_layernorm",
        ),
        *("layers.0.self_attn.o_proj", "layers.0.block_sparse_moe", "norm"),
    ],
)
@pytest.mark.parametrize("kind", ["hook", "adapter"])
def test_a_module_that_has_to_be_called_is_left_to_the_modules(monkeypatch, name, kind):
    """No launch calls it. A layer or its experts may be wrapped, too."""
    monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    model = packed_model(nf4)
    parent, _, last = name.rpartition(".")
    module = model.model.get_submodule(name)
    if kind == "hook":
        module.register_forward_hook(lambda *given: None)
    else:
        wrapper = torch.nn.Sequential(module)
        setattr(model.model.get_submodule(parent), last, wrapper)
    assert not supported(model.model)
    with torch.no_grad():
        cache = model.new_cache(1, 4)
        assert model.static_decoders.for_cache(model.model, model.lm_head, cache, None) is None


def test_a_head_that_has_to_be_called_is_left_to_the_modules(monkeypatch):
    monkeypatch.setattr("qmix.generation.static_decoders._on_gpu", lambda weight: True)
    model = packed_model(nf4)
    cache = model.new_cache(1, 4)
    with torch.no_grad():
        assert model.static_decoders.for_cache(model.model, model.lm_head, cache, None) is not None
        model.lm_head.register_forward_hook(lambda *given: None)
        assert model.static_decoders.for_cache(model.model, model.lm_head, cache, None) is None


@pytest.mark.parametrize("sampled", one_in(2, [True, False]))
def test_the_graph_gives_the_tokens_of_the_launches(sampled):
    """In the interpreter both are launched one by one; a seed gives the same tokens again."""
    model = packed_model(nf4, num_hidden_layers=1)
    found = []
    for record in (False, True):
        generator = torch.Generator(DEVICE).manual_seed(7)
        sample_fn = SampleFn(
            Sampling(temperature=1.0, top_p=0.9) if sampled else Sampling(), generator
        )
        cache = prefilled(model, PROMPT.to(DEVICE), None)
        step = StaticDecoder(model.model, model.lm_head, cache, sample_fn=sample_fn, record=record)
        step.ids.copy_(PROMPT[:, 0])
        ids = []
        for _ in range(2):
            step.step()
            ids.append(step.ids.clone())
        found.append((torch.stack(ids), step.logits.clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
