"""Fields of GenerationConfig: what they do, and which values are refused by name."""

from itertools import pairwise

import pytest
import torch

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import stream
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, ids, small_model


def test_return_sequences_are_draws_of_each_row_side_by_side(model):
    prompts = ids(5, batch=2)
    out = model.generate(
        prompts, max_new_tokens=8, do_sample=True, num_return_sequences=3, seed=0, temperature=2.0
    )
    assert out.shape == (6, 13)
    assert torch.equal(out[:, :5], prompts.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out}) == 6


def test_return_sequences_of_a_padded_batch_keep_its_padding(model):
    batch = ids(6, batch=2)
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    batch[0, :3] = 0
    out = model.generate(
        batch,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=True,
        top_k=1,
        num_return_sequences=2,
    )
    alone = model.generate(batch[:1, 3:], max_new_tokens=4)
    for row in out[:2]:
        assert torch.equal(row[3:], alone[0])


def test_scores_and_logits_are_given_on_request(model):
    out = model.generate(
        ids(5, batch=2),
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        repetition_penalty=1.5,
    )
    assert out.keys() == ("sequences", "scores", "logits", "past_key_values")
    assert out[0] is out.sequences is out["sequences"]
    assert len(out.scores) == len(out.logits) == 4
    assert out.scores[0].shape == (2, 128)
    assert out.past_key_values.length == 8
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        so_far = out.sequences[:, : 5 + step]
        assert torch.equal(scores.argmax(-1), out.sequences[:, 5 + step])
        whole = model(so_far).logits[:, -1]
        assert (logits - whole).abs().max() < 1e-4
        seen = torch.zeros(2, 128, dtype=torch.bool).scatter(1, so_far, True)
        assert torch.equal(scores[~seen], logits[~seen])
        assert not torch.equal(scores[seen], logits[seen])
    plain = model.generate(ids(5, batch=2), max_new_tokens=4, repetition_penalty=1.5)
    assert torch.equal(plain, out.sequences)


def test_drawn_scores_exclude_what_the_filters_exclude(model):
    out = model.generate(
        ids(5),
        max_new_tokens=3,
        do_sample=True,
        top_k=7,
        seed=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert [int(torch.isfinite(scores).sum()) for scores in out.scores] == [7, 7, 7]


def test_a_generation_goes_on_from_its_own_cache(model):
    first = model.generate(ids(5), max_new_tokens=4, return_dict_in_generate=True)
    cache = first.past_key_values
    again = model.generate(first.sequences, max_new_tokens=5, past_key_values=cache)
    assert torch.equal(again, model.generate(ids(5), max_new_tokens=9))
    with pytest.raises(UsageError, match="past_key_values"):
        model.generate(ids(5), max_new_tokens=5, past_key_values=cache)


def test_without_a_cache_the_ids_are_the_same(model):
    batch = ids(6, batch=2)
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6}
    cached = model.generate(batch, **options)
    assert torch.equal(model.generate(batch, use_cache=False, **options), cached)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("window", [None, 8])
def test_a_prefill_in_chunks_gives_the_same_ids(window, chunk):
    model = small_model(sliding_window=window)
    whole = model.generate(ids(40), max_new_tokens=8)
    fed = []
    original = model.next_logits
    model.next_logits = lambda x, *rest: (fed.append(x.shape[1]), original(x, *rest))[1]
    assert torch.equal(model.generate(ids(40), max_new_tokens=8, prefill_chunk_size=chunk), whole)
    assert max(fed) == min(chunk, 40)
    assert sum(fed) == 47


@torch.no_grad()
def test_embeddings_generate_what_their_ids_generate_new_ids_only(model):
    batch = ids(6, batch=2)
    mask = torch.ones_like(batch)
    mask[0, 4:] = 0
    embeds = model.get_input_embeddings()(batch)
    expected = model.generate(batch, attention_mask=mask, max_new_tokens=5)[:, 6:]
    found = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=5)
    assert torch.equal(found, expected)
    assert model.generate(inputs_embeds=embeds[1:], max_length=9).shape == (1, 3)
    for wrong in ({}, {"input_ids": batch, "inputs_embeds": embeds}, {"inputs_embeds": batch}):
        with pytest.raises(UsageError, match="input"):
            model.generate(**wrong)


def test_processors_change_the_scores_and_see_the_ids_so_far(model):
    lengths = []

    def only_even(input_ids, scores):
        lengths.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, 1::2] = -float("inf")
        return scores

    out = model.generate(ids(5), max_new_tokens=6, logits_processor=[only_even])
    assert not (out[0, 5:] % 2).any()
    assert lengths == [5, 6, 7, 8, 9, 10]
    drawn = model.generate(
        ids(5), max_new_tokens=6, do_sample=True, temperature=5.0, logits_processor=[only_even]
    )
    assert not (drawn[0, 5:] % 2).any()


def test_criteria_end_all_rows_or_each_its_own(model):
    batch = ids(5, batch=2)
    free = model.generate(batch, max_new_tokens=10)
    out = model.generate(
        batch, max_new_tokens=10, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 8]
    )
    assert torch.equal(out, free[:, :8])
    out = model.generate(
        batch,
        max_new_tokens=10,
        pad_token_id=1,
        stopping_criteria=[lambda ids, scores: torch.tensor([ids.shape[1] >= 7, False])],
    )
    assert torch.equal(out[1], free[1])
    assert torch.equal(out[0, :7], free[0, :7])
    assert set(out[0, 7:].tolist()) == {1}
    with pytest.raises(UsageError, match="stopping_criteria"):
        model.generate(batch, max_new_tokens=3, stopping_criteria=[lambda ids, scores: "stop"])


def test_a_criterion_ends_a_rows_text_too():
    """Text that waited because it might have become a stop string is written."""
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=1)
    model.tokenizer = tokenizer
    prompt = torch.tensor([tokenizer.encode("Return the")])
    free = "".join(model.stream("Return the", max_new_tokens=4))
    config = GenerationConfig(max_new_tokens=20, stop_strings=free[-2:] + "\0never")
    options = {
        "tokenizer": tokenizer,
        "stopping_criteria": [lambda ids, scores: ids.shape[1] >= prompt.shape[1] + 4],
    }
    found = list(stream(model, GenerationInputs(prompt, config, **options)))
    assert [token.finish for token in found] == [None] * 3 + ["stop"]
    assert "".join(token.texts[0] for token in found) == free


def test_an_end_is_held_off_for_exactly_min_new_tokens(model):
    def eager_to_end(input_ids, scores):
        return scores + 1000.0 * (torch.arange(128) == 9)

    options = {"max_new_tokens": 9, "eos_token_id": 9, "logits_processor": [eager_to_end]}
    for least in (0, 1, 3):
        out = model.generate(ids(5), min_new_tokens=least, **options)[0, 5:].tolist()
        assert out.index(9) == least
        assert len(out) == least + 1


def test_an_ngram_is_not_repeated_and_a_word_is_not_said(model):
    prompt = ids(6)
    out = model.generate(prompt, max_new_tokens=60, no_repeat_ngram_size=2)[0].tolist()
    pairs = list(pairwise(out))
    assert len(set(pairs[5:])) == len(pairs[5:])
    free = model.generate(prompt, max_new_tokens=3)[0, 6:].tolist()
    held = model.generate(prompt, max_new_tokens=3, bad_words_ids=[[free[0]]])[0, 6:].tolist()
    assert free[0] not in held
    held = model.generate(prompt, max_new_tokens=3, bad_words_ids=[free[:2]])[0, 6:].tolist()
    assert held[0] == free[0]
    assert held[1] != free[1]


def test_ngrams_of_a_padded_row_are_those_of_the_row_alone(model):
    batch = ids(9, batch=2)
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    batch[0, :4] = batch[0, 4]
    options = {"max_new_tokens": 20, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3}
    out = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(out[0, 4:], model.generate(batch[:1, 4:], **options)[0])


def test_draws_do_not_depend_on_how_rows_are_padded(model):
    batch = ids(6, batch=2)
    left, right = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    left[:, 3:], right[:, :6] = batch, batch
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 4}
    outs = [
        model.generate(padded, attention_mask=padded != 0, **options)[:, 9:]
        for padded in (left, right)
    ]
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_return_sequences": 0, "do_sample": True}, "num_return_sequences"),
        ({"output_scores": True}, "output_scores"),
        ({"output_logits": True}, "output_logits"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
        ({"use_cache": "yes"}, "use_cache"),
        ({"do_sample": 1}, "do_sample"),
        ({"min_new_tokens": "few"}, "min_new_tokens"),
        ({"generation_config": {"max_new_tokens": 3}}, "generation_config"),
        ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask"),
        ({"logits_processor": [lambda ids, scores: None]}, "logits_processor"),
        ({"logits_processor": [lambda ids, scores: scores[0]]}, "logits_processor"),
        ({"typical_p": 0.9}, "typical_p"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_other_values_and_unknown_fields_are_refused_by_name(model, options, named):
    with pytest.raises(UsageError, match=named):
        model.generate(ids(4), **options)


def test_none_leaves_an_option_at_its_default(model):
    """As in transformers, where `do_sample=False, temperature=None, top_p=None` is common."""
    names = (
        *("do_sample", "temperature", "top_p", "min_p", "repetition_penalty", "min_new_tokens"),
        *("no_repeat_ngram_size", "num_return_sequences", "num_beams", "use_cache"),
        *("output_scores", "return_dict_in_generate"),
    )
    given = dict.fromkeys(names)
    assert GenerationConfig(**given) == GenerationConfig()
    expected = model.generate(ids(4), max_new_tokens=6)
    out = model.generate(
        ids(4), max_new_tokens=6, logits_processor=None, stopping_criteria=None, **given
    )
    assert torch.equal(out, expected)


def test_a_config_of_ones_own_keeps_the_models_special_ids(model):
    """As in transformers 5: ids that it leaves out are the model's; an option still unsets them."""
    free = model.generate(ids(4), max_new_tokens=9)
    end = int(free[0, 6])
    model.generation_config = model.generation_config.updated({"eos_token_id": end})
    own = GenerationConfig(max_new_tokens=9)
    assert model.generate(ids(4), own).shape[1] < 4 + 9
    assert torch.equal(model.generate(ids(4), generation_config=own, eos_token_id=None), free)
    other = GenerationConfig(max_new_tokens=9, eos_token_id=[])
    assert torch.equal(model.generate(ids(4), other), free)


def test_temperature_zero_is_greedy_and_top_k_is_50_unless_given(model):
    greedy = model.generate(ids(4), max_new_tokens=6)
    cold = model.generate(ids(4), max_new_tokens=6, do_sample=True, temperature=0.0)
    assert torch.equal(cold, greedy)
    out = model.generate(
        ids(4),
        max_new_tokens=1,
        do_sample=True,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert int(torch.isfinite(out.scores[0]).sum()) == 50


def test_embeddings_need_a_cache(model):
    embeds = model.get_input_embeddings()(ids(4)).detach()
    with pytest.raises(UsageError, match="use_cache"):
        model.generate(inputs_embeds=embeds, use_cache=False)


def test_a_cache_goes_with_padding_on_the_left_only(model):
    batch = ids(6, batch=2)
    mask = torch.ones_like(batch)
    mask[0, 4:] = 0
    with torch.no_grad():
        past = model(batch[:, :3]).past_key_values
    with pytest.raises(UsageError, match="left only"):
        model.generate(batch, attention_mask=mask, past_key_values=past, max_new_tokens=2)
