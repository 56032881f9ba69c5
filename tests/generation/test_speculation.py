"""Drafts from the text: how fast ids come, and never which."""

from dataclasses import replace

import pytest
import torch

import qmix
from qmix.generation import loop
from qmix.generation.config import GenerationConfig
from qmix.generation.draft_length import DraftLength
from qmix.generation.drafted_text import Drafter
from qmix.generation.inputs import GenerationInputs
from qmix.generation.loop import generate, stream
from qmix.kernels.cpu.library import library
from qmix.models.offload import Tiers
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, ids, load_in_tiers, small_model
from tests.support.process import session_of

NEW = 30
SAMPLED = {"do_sample": True, "temperature": 0.7, "seed": 3}


class Always(DraftLength):
    """Drafts as much as it may, whatever it costs."""

    def best(self, matched, most, rows=1, ids=1.0):
        return most


def drafter(*texts):
    """One that always drafts, and has seen these texts."""
    made = Drafter()
    made.length = Always()
    for text in texts:
        made.lookup.begin(text)
    return made


def config_of(*, drafts=15, **options):
    given = {"max_new_tokens": NEW, **options, "prompt_lookup_num_tokens": drafts}
    return GenerationConfig(**given, return_dict_in_generate=True, output_scores=True)


def wrong_here_and_there(text):
    return [index if place % 7 else 5 for place, index in enumerate(text)]


def both(model, prompt, texts_of=lambda whole: [whole], **options):
    """The output without drafts, with those from an earlier text, and what these did."""
    inputs = GenerationInputs(prompt, config_of(drafts=None, **options))
    plain, drafts = generate(model, inputs), []
    whole = plain.sequences[0].tolist()
    inputs = replace(inputs, config=config_of(**options), drafter=drafter(*texts_of(whole)))

    def watched(*given):
        for token in stream(*given):
            drafts.append(token.drafts)
            yield token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stream", watched)
        found = generate(model, inputs)
    return plain, found, drafts[-1]


def assert_same(plain, found, *, exactly=False):
    assert torch.equal(plain.sequences, found.sequences)
    near = torch.equal if exactly else lambda a, b: torch.allclose(a, b, atol=1e-4)
    for ours, theirs in zip(found.scores, plain.scores, strict=True):
        assert near(ours, theirs)
    cache, other = found.past_key_values, plain.past_key_values
    assert cache.length == other.length == plain.sequences.shape[1] - 1
    for pair, expected in zip(cache, other, strict=True):
        assert all(map(near, pair, expected))


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_text_that_came_before_comes_again_in_few_passes(window, options):
    model = small_model(sliding_window=window)
    plain, found, drafts = both(model, ids(12), **options)
    assert_same(plain, found)
    rows = min(16, window or 16)
    assert drafts.passes <= 2 + (NEW - 1) // rows
    assert drafts.passes + drafts.accepted == NEW - 1
    assert drafts.ids_per_pass > rows / 2


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {**SAMPLED, "top_p": 0.9, "min_p": 0.02, "seed": 9},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 3},
        {"bad_words_ids": [[5], [6, 7]]},
    ],
    ids=str,
)
def test_wrong_drafts_change_nothing(window, options):
    model = small_model(sliding_window=window)
    plain, found, drafts = both(
        model, ids(12), lambda whole: [wrong_here_and_there(whole)], **options
    )
    assert_same(plain, found)
    assert 0 < drafts.accepted < drafts.drafted


@pytest.mark.parametrize("host", [None, 9])
def test_the_same_ids_to_the_bit_where_the_compiled_kernels_take_every_row(tiny_nf4, host):
    """In memory, and with experts in their file."""
    model, tokenizer = qmix.load(tiny_nf4)
    if host is not None:
        model = load_in_tiers(tiny_nf4, "cpu", Tiers(device=0, host=host))
    text = "def area(width, height):\n    return width * height\n\n\n" * 2
    prompt = torch.tensor([tokenizer.encode(text + "def area(width")])
    exact = model.exact_rows()
    for options in ({}, SAMPLED, {"repetition_penalty": 1.2}):
        plain, found, drafts = both(model, prompt, lambda _: [], **options)
        assert exact > 1 or library().isa in (None, "portable")
        if exact > 1:
            assert_same(plain, found, exactly=True)
        assert torch.equal(plain.sequences, found.sequences)
        assert drafts.drafted > 0
        assert drafts.passes < NEW - 1 or options


def test_the_sampled_ids_are_the_generators_own_for_every_seed():
    """So the distribution is what it is without drafts."""
    model = small_model(num_hidden_layers=1)
    for seed in range(10):
        options = {"do_sample": True, "temperature": 1.5, "seed": seed, "max_new_tokens": 9}
        plain, found, _ = both(model, ids(6, seed=seed), **options)
        assert torch.equal(plain.sequences, found.sequences)
    torch.manual_seed(5)
    plain = model.generate(ids(6), config_of(drafts=None, do_sample=True))
    after = torch.rand(1)
    torch.manual_seed(5)
    found = model.generate(ids(6), config_of(do_sample=True))
    assert torch.equal(plain.sequences, found.sequences)
    assert torch.equal(after, torch.rand(1))


def test_processors_and_criteria_see_chosen_ids_alone_one_step_after_the_other():
    model = small_model()

    def seen(config, made):
        lengths, rows = [], []

        def processor(input_ids, scores):
            lengths.append(input_ids.shape[1])
            rows.append(input_ids[0].tolist())
            return scores.roll(1, -1)

        def criterion(input_ids, scores):
            rows.append(input_ids[0].tolist())
            return input_ids.shape[1] == 30

        inputs = GenerationInputs(
            ids(12),
            config,
            logits_processor=[processor],
            stopping_criteria=[criterion],
            drafter=made,
        )
        tokens = list(stream(model, inputs))
        return [int(token.ids) for token in tokens], tokens[-1].finish, lengths, rows

    plain = seen(config_of(drafts=None), None)
    assert plain[1] == "stop"
    text = [*ids(12)[0].tolist(), *plain[0]]
    assert seen(config_of(), drafter(text)) == plain
    assert seen(config_of(), drafter(wrong_here_and_there(text))) == plain


def test_texts_stops_and_ends_are_those_without_drafts():
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(vocab_size=len(tokenizer))
    prompt = torch.tensor([tokenizer.encode("Return the")])

    def told(config, made=None):
        inputs = GenerationInputs(prompt, config, tokenizer=tokenizer, drafter=made)
        return [(int(t.ids), t.texts, t.finish) for t in stream(model, inputs)]

    free = told(config_of(drafts=None))
    whole = [*prompt[0].tolist(), *(index for index, *_ in free)]
    text = "".join(texts[0] for _, texts, _ in free)
    for options in (
        {},
        {"stop_strings": text[20:26]},
        {"eos_token_id": free[7][0]},
        {"eos_token_id": free[7][0], "min_new_tokens": 20},
        {"max_new_tokens": 9},
        {"max_new_tokens": 1},
    ):
        expected = told(config_of(drafts=None, **options))
        assert told(config_of(**options), drafter(whole)) == expected


@pytest.mark.parametrize("window", [None, 16])
def test_an_interrupted_pass_and_a_reader_who_leaves_keep_the_cache_whole(window, monkeypatch):
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(
        vocab_size=len(tokenizer), sliding_window=window, max_position_embeddings=512
    )

    def turns(config, leave, made=None):
        """Answers of three turns, each left after some pieces or in the middle of a pass."""
        session = session_of(model, tokenizer, config, context=256)
        if made is not None:
            session.model.drafter = made
        original, calls = model.next_logits, []

        def interrupted(input_ids, *rest):
            calls.append(len(input_ids))
            found = original(input_ids, *rest)
            if leave == "interrupt" and len(input_ids) > 1 and len(calls) % 3 == 0:
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(model, "next_logits", interrupted)
        for text in ("one", "two", "one"):
            reply = session.reply(session.prepare(text))
            try:
                for _ in zip(range(7 if leave == "reader" else 99), reply, strict=False):
                    pass
            except KeyboardInterrupt:
                pass
            reply.close()
            monkeypatch.setattr(model, "next_logits", original)
            assert session.model.cache.length == len(session.model.cached)
            fresh = model.new_cache(1)
            model.next_logits(torch.tensor([session.model.cached]), fresh)
            for ours, theirs in zip(session.model.cache, fresh, strict=True):
                assert all(
                    torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True)
                )
            monkeypatch.setattr(model, "next_logits", interrupted)
            yield session.turns[-1].answer if session.turns else ()
        monkeypatch.setattr(model, "next_logits", original)

    options = {"max_new_tokens": 24, "eos_token_id": 2}
    plain = list(turns(GenerationConfig(**options), "reader"))
    config = GenerationConfig(**options, prompt_lookup_num_tokens=15)
    assert list(turns(config, "reader", drafter())) == plain
    for answer in turns(config, "interrupt", drafter()):
        assert len(answer) <= 24


def test_where_rows_are_several_padded_or_without_a_cache_nothing_is_drafted():
    model = small_model()
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, :3] = 0
    for inputs in (
        GenerationInputs(ids(12, batch=2), config_of()),
        GenerationInputs(ids(12), config_of(), attention_mask=mask),
        GenerationInputs(ids(12), config_of(use_cache=False)),
        GenerationInputs(ids(12), config_of(drafts=None)),
    ):
        assert next(stream(model, inputs)).drafts is None
    full = GenerationInputs(ids(12), config_of(), attention_mask=torch.ones(1, 12))
    assert next(stream(model, full)).drafts is not None


def test_after_embeddings_the_new_ids_are_drafted_from():
    model = small_model()
    embeds = model.model.embed(ids(12)).detach()
    plain = model.generate(inputs_embeds=embeds, max_new_tokens=NEW)
    inputs = GenerationInputs(None, config_of(), inputs_embeds=embeds, drafter=drafter())
    assert torch.equal(generate(model, inputs).sequences, plain)


def test_no_pass_runs_beyond_the_last_id():
    model = small_model()
    plain = model.generate(ids(12), max_new_tokens=10)[0].tolist()
    sizes = []
    original = model.next_logits
    model.next_logits = lambda x, *rest: (sizes.append(x.shape), original(x, *rest))[1]
    inputs = GenerationInputs(
        ids(12), config_of(max_new_tokens=10), drafter=drafter([*plain, 1, 1, 1, 1])
    )
    list(stream(model, inputs))
    assert sizes == [(1, 12), (9, 1)]


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@torch.no_grad()
def test_drafted_ids_have_the_distribution_of_sampled_ones():
    """Chi-square of the id after a first one, which a draft foretells, over many seeds.

    The same statistic finds the usual mistake, a second sample where the draft is refused.
    """
    times, vocabulary, limit = 150, 8, 26.1  # 7 degrees of freedom: one in 2,000 lies above
    model = small_model(num_hidden_layers=1, vocab_size=vocabulary)
    prompt = ids(6) % vocabulary
    first = int(model.generate(prompt, max_new_tokens=1)[0, -1])
    text = torch.cat((prompt, torch.tensor([[first]])), 1)
    chances = (model(text).logits[0, -1] * 0.5).softmax(-1).double()
    foretold = int(chances.argmax())
    assert 0.2 < chances[foretold] < 0.8
    counts, accepted = torch.zeros(vocabulary, dtype=torch.float64), 0

    def starts(input_ids, scores):
        """The first id is fixed; the scores of others are a text's own, made less even."""
        if input_ids.shape[1] > prompt.shape[1]:
            return scores * 0.5
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([first]), 0.0)

    for seed in range(times):
        inputs = GenerationInputs(
            prompt,
            config_of(do_sample=True, max_new_tokens=3, seed=seed),
            logits_processor=[starts],
            drafter=drafter([*text[0].tolist(), foretold, 1, 1]),
        )
        tokens = list(stream(model, inputs))
        counts[int(tokens[1].ids)] += 1
        assert tokens[-1].drafts.drafted > 0
        accepted += tokens[-1].drafts.accepted > 0
    assert chi_square(counts, times * chances) < limit
    assert accepted == counts[foretold]
    mistaken = (1 - chances[foretold]) * chances
    mistaken[foretold] += chances[foretold]
    assert chi_square(times * mistaken, times * chances) > limit
