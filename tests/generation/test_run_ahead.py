"""The loop runs a step ahead of what the host has read, and nobody can tell from the ids."""

from dataclasses import replace

import pytest
import torch

from qmix.errors import QmixError
from qmix.generation import loop
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import generate, stream
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.busy_device import BusyDevice
from tests.support.models import TINY, ids, small_model
from tests.support.process import session_of

SAMPLED = {"do_sample": True, "temperature": 2.0, "seed": 5}


def padded_prompt(rows=3):
    prompt = ids(6, batch=rows, seed=4)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    return GenerationInputs(prompt, attention_mask=mask)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window", [None, 8])
def test_no_step_is_waited_for_before_the_next_is_enqueued(options, window, monkeypatch):
    model = small_model(sliding_window=window)
    inputs = replace(padded_prompt(), config=GenerationConfig(max_new_tokens=12, **options))
    expected = generate(model, inputs)
    device = BusyDevice(model, monkeypatch)
    assert torch.equal(generate(model, inputs), expected)
    assert device.enqueued == 11  # one for each new id but the first, which the prompt gives
    assert device.most_ahead == 2  # the one that is read next, and one more


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_rows_that_end_get_padding_without_a_wait(options, monkeypatch):
    """The ids, and the keys of every column in the cache, are those of plain decoding."""
    model = small_model()
    inputs = padded_prompt()
    free = generate(model, replace(inputs, config=GenerationConfig(max_new_tokens=12, **options)))
    eos = [int(free[0, 8]), int(free[1, 10])]
    config = GenerationConfig(
        max_new_tokens=12, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True, **options
    )
    expected = generate(model, replace(inputs, config=config))
    device = BusyDevice(model, monkeypatch)
    found = generate(model, replace(inputs, config=config))
    assert torch.equal(found.sequences, expected.sequences)
    assert device.enqueued >= 5
    for ours, plain in zip(found.past_key_values, expected.past_key_values, strict=True):
        assert all(map(torch.equal, ours, plain))


def test_a_stop_drops_one_step_and_the_cache_does_not_count_it(monkeypatch):
    model = small_model()
    free = model.generate(ids(5), max_new_tokens=9)[0, 5:].tolist()
    until = free.index(free[6]) + 1
    device = BusyDevice(model, monkeypatch)
    cache = model.new_cache(1, 32)
    config = GenerationConfig(max_new_tokens=9, eos_token_id=free[6])
    tokens = list(stream(model, GenerationInputs(ids(5), config, cache=cache)))
    assert [int(token.ids) for token in tokens] == free[:until]
    assert cache.length == 5 + until - 1  # all columns but the newest
    assert device.enqueued == until  # one of them in vain
    assert BusyDevice.running == 0  # and it has ended, whichever stream comes next


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("stopped_by", ["eos", "reader"])
def test_the_next_turn_says_what_it_says_without_running_ahead(options, stopped_by, monkeypatch):
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(vocab_size=len(tokenizer))

    def turns(config):
        session = session_of(model, tokenizer, config, context=256)
        for text in ("one", "two", "three"):
            reply = session.reply(session.prepare(text))
            kept = 4 if stopped_by == "reader" else 99
            pieces = [piece for _, piece in zip(range(kept), reply, strict=False)]
            reply.close()
            yield pieces, session.turns[-1].answer, session.stats.context_tokens

    config = GenerationConfig(max_new_tokens=10, **options)
    if stopped_by == "eos":
        config.eos_token_id = next(turns(config))[1][3]
    expected = list(turns(config))
    device = BusyDevice(model, monkeypatch)
    assert list(turns(config)) == expected
    new = sum(len(answer) for _, answer, _ in expected)
    assert new / 2 < device.enqueued <= new + 3  # a step a turn in vain, at most


def test_where_no_step_fits_any_more_the_plain_path_goes_on(monkeypatch):
    model = small_model()
    for options in ({}, SAMPLED):
        expected = model.generate(ids(5), max_new_tokens=12, **options)
        with monkeypatch.context() as patch:
            device = BusyDevice(model, patch, longest=9)
            assert torch.equal(model.generate(ids(5), max_new_tokens=12, **options), expected)
        assert device.enqueued == 4


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [lambda ids, scores: scores.roll(1, -1)]},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 3, "eos_token_id": 1},
    ],
    ids=["processor", "penalty", "ngrams", "min_new_tokens"],
)
def test_what_needs_the_whole_context_takes_the_plain_path(options, monkeypatch):
    model = small_model()
    expected = model.generate(ids(5), max_new_tokens=6, **options)
    device = BusyDevice(model, monkeypatch)
    assert torch.equal(model.generate(ids(5), max_new_tokens=6, **options), expected)
    assert device.enqueued == 0


def test_a_criterion_sees_the_ids_so_far(monkeypatch):
    """It asks for the context, so it waits; it sees what it sees without running ahead."""
    model, seen = small_model(), []

    def criterion(context, scores):
        seen.append(context.as_subclass(torch.Tensor).tolist())
        return len(seen) == 4

    expected = model.generate(ids(5), max_new_tokens=9, stopping_criteria=[criterion])
    plain = list(seen)
    seen.clear()
    BusyDevice(model, monkeypatch, context_may_wait=True)
    found = model.generate(ids(5), max_new_tokens=9, stopping_criteria=[criterion])
    assert torch.equal(found, expected)
    assert seen == plain


def test_scores_that_are_not_finite_are_found_after_a_step_ran_with_them(monkeypatch):
    model = small_model()
    device = BusyDevice(model, monkeypatch)
    enqueue = model.sample_next

    def sample_next(given, cache, mask, sample_fn):
        step = enqueue(given.clamp(min=0), cache, mask, sample_fn)  # as a recorded step does
        if device.enqueued == 3:
            step.ids.fill_(-1)
            step.ids_on_host._values.fill_(-1)
        return step

    monkeypatch.setattr(model, "sample_next", sample_next)
    with pytest.raises(QmixError, match="non-finite"):
        model.generate(ids(5), max_new_tokens=9)
    assert device.enqueued == 4
    assert BusyDevice.running == 0


def test_a_seed_of_its_own_where_a_recorded_step_would_take_the_global_generator():
    """On a GPU; the seed comes from torch's generator, so that torch.manual_seed decides it."""
    sampled, gpu = GenerationConfig(do_sample=True), torch.device("cuda")
    torch.manual_seed(3)
    drawn = [loop.seed_for(sampled, gpu) for _ in range(2)]
    torch.manual_seed(3)
    assert drawn == [loop.seed_for(sampled, gpu) for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert loop.seed_for(GenerationConfig(do_sample=True, seed=9), gpu) == 9
    assert loop.seed_for(GenerationConfig(), gpu) is None
    assert loop.seed_for(sampled, torch.device("cpu")) is None


def test_a_conversation_on_a_gpu_grows_its_cache_seldom():
    """Twenty turns of 150 ids make room three times, and never for more than can follow."""
    lengths = [150 * turn for turn in range(1, 21)]
    reserved = [loop.columns_to_reserve(prompt, 4096 - prompt) for prompt in lengths]
    assert sorted(set(reserved)) == [2048, 3072, 4096]
    assert loop.columns_to_reserve(100, 20) == 120
    assert loop.columns_to_reserve(4000, 5000) == 5120
