from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from qmix.errors import UsageError
from qmix.generation import loop as generation
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, ids, small_model


def by_hand(model, prompt, count):
    """Greedy decoding without a cache."""
    with torch.no_grad():
        for _ in range(count):
            best = model(input_ids=prompt, use_cache=False).logits[:, -1].argmax(-1)
            prompt = torch.cat((prompt, best[:, None]), 1)
    return prompt


@pytest.mark.parametrize("window", [None, 8])
def test_greedy_equals_decoding_without_a_cache(window):
    model = small_model(sliding_window=window)
    out = model.generate(ids(5), max_new_tokens=24)
    assert torch.equal(out, by_hand(model, ids(5), 24))


def test_a_prompt_longer_than_the_prefill_chunk_gives_the_same_ids(monkeypatch):
    model = small_model(sliding_window=8)
    whole = model.generate(ids(40), max_new_tokens=8)
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 7)
    assert torch.equal(model.generate(ids(40), max_new_tokens=8), whole)


@pytest.mark.parametrize("window", [None, 8])
def test_a_left_padded_batch_gives_each_row_what_it_gets_alone(window):
    model = small_model(sliding_window=window)
    short, long = ids(3, seed=2), ids(20, seed=3)
    batch = torch.cat((torch.cat((torch.zeros(1, 17, dtype=torch.long), short), 1), long))
    mask = torch.ones_like(batch)
    mask[0, :17] = 0
    out = model.generate(batch, attention_mask=mask, max_new_tokens=30)
    assert torch.equal(out[0, 17:], model.generate(short, max_new_tokens=30)[0])
    assert torch.equal(out[1], model.generate(long, max_new_tokens=30)[0])


def test_lengths_are_hugging_faces():
    model = small_model()
    assert model.generate(ids(5), max_new_tokens=3).shape == (1, 8)
    assert model.generate(ids(5), max_length=9).shape == (1, 9)
    assert model.generate(ids(5)).shape == (1, 25)
    with pytest.raises(UsageError, match="no room"):
        model.generate(ids(5), max_length=5)


def test_rows_that_end_are_filled_with_pad_until_all_have_ended():
    model = small_model()
    prompts = ids(6, batch=2, seed=4)
    free = model.generate(prompts, max_new_tokens=12)
    eos = int(free[0, 8])
    out = model.generate(prompts, max_new_tokens=12, eos_token_id=eos, pad_token_id=0)
    for row, whole in zip(out, free, strict=True):
        new = whole[6:].tolist()
        stop = new.index(eos) + 1 if eos in new else len(new)
        assert row[6 : 6 + stop].tolist() == new[:stop]
        assert set(row[6 + stop :].tolist()) <= {0}
    assert len(out[0]) <= 18


def test_eos_ids_may_be_several_and_min_new_tokens_holds_them_off():
    model = small_model()
    free = model.generate(ids(6), max_new_tokens=6)[0, 6:].tolist()
    out = model.generate(ids(6), max_new_tokens=6, eos_token_id=[free[1], 1])
    assert out[0, 6:].tolist() == free[: free.index(free[1]) + 1]
    held = model.generate(ids(6), max_new_tokens=6, eos_token_id=free[0], min_new_tokens=3)
    assert free[0] not in held[0, 6:9].tolist()


def test_the_same_seed_gives_the_same_ids_and_another_gives_others():
    model = small_model()
    draw = lambda seed: model.generate(  # noqa: E731
        ids(4), max_new_tokens=20, do_sample=True, temperature=2.0, seed=seed
    )
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    state = torch.random.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.random.get_rng_state())


def test_top_k_one_is_greedy():
    model = small_model()
    greedy = model.generate(ids(4), max_new_tokens=10)
    drawn = model.generate(ids(4), max_new_tokens=10, do_sample=True, top_k=1, seed=0)
    assert torch.equal(greedy, drawn)


def test_the_streamer_gets_the_prompt_then_each_token_then_the_end():
    class Recorder:
        def __init__(self):
            self.calls = []

        def put(self, value):
            self.calls.append(value.tolist())

        def end(self):
            self.calls.append("end")

    model, recorder = small_model(), Recorder()
    out = model.generate(ids(4), max_new_tokens=3, streamer=recorder)
    assert recorder.calls == [ids(4).tolist(), *([int(t)] for t in out[0, 4:]), "end"]


def test_a_streamer_hears_of_the_end_after_a_failure_too():
    """A reader in another thread would wait forever."""

    class Recorder:
        ended = False

        def put(self, value):
            pass

        def end(self):
            self.ended = True

    def fail(ids, scores):
        raise ZeroDivisionError

    recorder = Recorder()
    with pytest.raises(ZeroDivisionError):
        small_model().generate(ids(4), max_new_tokens=3, streamer=recorder, logits_processor=[fail])
    assert recorder.ended


def test_a_model_in_training_generates_without_dropout_and_trains_on():
    model = small_model(attention_dropout=0.5)
    expected = model.generate(ids(4), max_new_tokens=6)
    model.train()
    assert torch.equal(model.generate(ids(4), max_new_tokens=6), expected)
    assert all(module.training for module in model.modules())


def test_tokens_say_when_and_why_generation_ended():
    model = small_model()
    tokens = list(stream(model, GenerationInputs(ids(4), GenerationConfig(max_new_tokens=3))))
    assert [token.finish for token in tokens] == [None, None, "length"]
    eos = int(tokens[1].ids)
    config = GenerationConfig(max_new_tokens=9, eos_token_id=eos)
    tokens = list(stream(model, GenerationInputs(ids(4), config)))
    assert tokens[-1].finish == "stop"
    assert all(a.elapsed_s <= b.elapsed_s for a, b in pairwise(tokens))


def test_a_text_that_its_budget_ends_has_not_ended_by_itself():
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(vocab_size=len(tokenizer))
    inputs = GenerationInputs(ids(4), GenerationConfig(max_new_tokens=3), tokenizer=tokenizer)
    tokens = list(stream(model, inputs))
    assert [token.finish for token in tokens] == [None, None, "length"]
    letter = tokens[-1].texts[0][-1]
    config = GenerationConfig(max_new_tokens=3, stop_strings=letter)
    assert list(stream(model, replace(inputs, config=config)))[-1].finish == "stop"


def test_a_cache_that_holds_a_prefix_is_not_computed_again():
    model = small_model()
    prompt = ids(12)
    cache = model.new_cache(1)
    with torch.no_grad():
        model.next_logits(prompt[:, :9], cache)
    fed = []
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    original = model.next_logits
    model.next_logits = lambda x, *rest: (fed.append(x.shape[1]), original(x, *rest))[1]
    config = GenerationConfig(max_new_tokens=5)
    again = [int(t.ids) for t in stream(model, GenerationInputs(prompt, config, cache=cache))]
    assert fed == [3, 1, 1, 1, 1]
    assert again == small_model().generate(prompt, max_new_tokens=5)[0, 12:].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"max_new_tokens": 10**12},
        {"max_new_tokens": 2.5},
        {"do_sample": True, "temperature": -1.0},
        {"do_sample": True, "top_p": 1.5},
        {"seed": -1},
        {"seed": 2**80},
        {"stop_strings": [""]},
        {"num_beams": 4},
        {"temprature": 1.0},
    ],
)
def test_unknown_options_and_values_out_of_range_are_refused_by_name(options):
    name = list(options)[-1]
    with pytest.raises(UsageError, match=name):
        small_model().generate(ids(4), **options)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="empty"):
        small_model().generate(torch.empty(1, 0, dtype=torch.long))


def test_passing_the_models_positions_warns():
    model = small_model(max_position_embeddings=16)
    with pytest.warns(UserWarning, match="16 positions"):
        model.generate(ids(10), max_new_tokens=8)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(UsageError, match="tokenizer"):
        small_model().generate(ids(4), stop_strings=["x"])


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


def test_streamed_texts_are_the_decoded_ids(tokenizer):
    model = small_model(vocab_size=len(tokenizer))
    prompt = torch.tensor([tokenizer.encode("Return the")])
    config = GenerationConfig(max_new_tokens=40)
    tokens = list(stream(model, GenerationInputs(prompt, config, tokenizer=tokenizer)))
    ids = [int(token.ids) for token in tokens]
    text = "".join(token.texts[0] for token in tokens)
    whole = tokenizer.decode([*prompt[0].tolist(), *ids], skip_special_tokens=True)
    assert tokenizer.decode(prompt[0], skip_special_tokens=True) + text == whole


def test_a_stop_string_ends_the_row_stays_in_the_ids_and_is_left_out_of_the_text(tokenizer):
    model = small_model(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    free = "".join(model.stream("Return the", max_new_tokens=40))
    stop = free[20:26]
    cut = free.index(stop)
    for stops in (stop, ["never seen", stop]):
        text = "".join(model.stream("Return the", max_new_tokens=40, stop_strings=stops))
        assert text == free[:cut]
    prompt = torch.tensor([tokenizer.encode("Return the")])
    out = model.generate(prompt, max_new_tokens=40, stop_strings=[stop])
    decoded = tokenizer.decode(out[0], skip_special_tokens=True)
    assert stop in decoded
    assert len(out[0]) < prompt.shape[1] + 40
    prefix_only = "".join(
        model.stream("Return the", max_new_tokens=40, stop_strings=[stop + "\0never"])
    )
    assert prefix_only == free


def test_streaming_text_needs_a_tokenizer():
    with pytest.raises(UsageError, match=r"qmix\.load"):
        next(small_model().stream("hello"))
