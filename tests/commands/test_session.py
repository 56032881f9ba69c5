"""The conversation: history, cache reuse, interruption and overflow."""

import pytest
import torch

from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.text import chat_template
from qmix.text.chat_encoder import ChatTemplate
from qmix.text.chat_format import TemplateFormat, chat_format
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.chat_templates import CHATML
from tests.support.models import TINY, small_model
from tests.support.process import session_of


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


def make(tokenizer, **options):
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=256)
    config = GenerationConfig(max_new_tokens=12, eos_token_id=2)
    return session_of(model, tokenizer, config, **options)


def say(session, text):
    prompt = session.prepare(text)
    return prompt, "".join(session.reply(prompt))


def chatml(tokenizer):
    return TemplateFormat(tokenizer, ChatTemplate(name="default", source=CHATML), "ChatML")


def test_the_prompt_of_every_turn_is_the_template_of_all_messages(tokenizer):
    session = make(tokenizer, system="Be brief.")
    say(session, "Hi")
    prompt, _ = say(session, "And?")
    first = session.turns[0]
    assert list(prompt.ids) == chat_template.encode(
        [
            Message("system", "Be brief."),
            Message("user", "Hi"),
            Message("assistant", "", first.answer),
            Message("user", "And?"),
        ],
        tokenizer,
    )


def test_the_cache_kept_between_turns_gives_what_a_cold_prefill_gives(tokenizer):
    session = make(tokenizer)
    for text in ("Hello there", "What is a list?", "More"):
        prompt, _ = say(session, text)
        cold = session.model.causal_lm.generate(
            torch.tensor([prompt.ids]), max_new_tokens=12, eos_token_id=2
        )[0, len(prompt.ids) :].tolist()
        answer = list(session.turns[-1].answer)
        assert cold[: len(answer)] == answer
    assert session.stats.cached_tokens > 20


def test_a_reply_that_is_stopped_is_kept_in_history_and_cache(tokenizer):
    session = make(tokenizer)
    prompt = session.prepare("Hello")
    pieces = session.reply(prompt)
    next(pieces)
    pieces.close()
    kept = session.turns[0].answer
    assert 1 <= len(kept) < 12
    prompt, _ = say(session, "Go on")
    assert prompt.cached_tokens >= len(kept)
    assert (
        list(kept)
        == list(prompt.ids)[-len(chat_template.continue_turn("Go on", tokenizer)) - len(kept) :][
            : len(kept)
        ]
    )


def test_an_interrupt_inside_the_model_keeps_what_was_generated(tokenizer):
    session = make(tokenizer)
    original, calls = session.model.causal_lm.next_logits, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    session.model.causal_lm.next_logits = interrupted
    prompt = session.prepare("Hello")
    with pytest.raises(KeyboardInterrupt):
        list(session.reply(prompt))
    assert len(session.turns[0].answer) == 3
    session.model.causal_lm.next_logits = original
    prompt, _ = say(session, "Again")
    cold = session.model.causal_lm.generate(
        torch.tensor([prompt.ids]), max_new_tokens=12, eos_token_id=2
    )
    answer = session.turns[-1].answer
    assert tuple(cold[0, len(prompt.ids) :].tolist()[: len(answer)]) == answer


def test_an_interrupt_before_the_first_token_drops_the_message(tokenizer):
    session = make(tokenizer)

    def interrupted(*_):
        raise KeyboardInterrupt

    session.model.causal_lm.next_logits = interrupted
    prompt = session.prepare("Hello")
    with pytest.raises(KeyboardInterrupt):
        list(session.reply(prompt))
    assert session.turns == []


def test_a_full_context_drops_the_oldest_turns_and_says_so(tokenizer):
    session = make(tokenizer, context=128)
    dropped = []
    for index in range(12):
        prompt, _ = say(session, f"Tell me about number {index}")
        assert len(prompt.ids) <= 128
        assert session.stats.context_tokens <= 128
        dropped.append(prompt.dropped_turns)
    assert sum(dropped) > 0
    assert dropped.count(0) > len(dropped) / 2  # several turns at once, then peace
    assert session.turns[-1].user == "Tell me about number 11"


def test_a_message_that_alone_does_not_fit_is_refused_with_both_numbers(tokenizer):
    session = make(tokenizer, context=64)
    with pytest.raises(UsageError, match=r"at most 52 tokens.*found \d+ tokens"):
        session.prepare("word " * 200)
    assert session.turns == []


def test_clear_forgets_the_turns_and_a_new_system_prompt_takes_effect(tokenizer):
    session = make(tokenizer)
    say(session, "Hello")
    session.clear()
    session.system = "Be kind."
    prompt = session.prepare("Hi")
    assert list(prompt.ids) == chat_template.encode(
        [Message("system", "Be kind."), Message("user", "Hi")], tokenizer
    )


@pytest.mark.parametrize("context", [0, 15, 257])
def test_a_context_outside_the_models_is_refused(tokenizer, context):
    with pytest.raises(UsageError, match="16 to 256"):
        make(tokenizer, context=context)


def test_a_rolling_cache_is_kept_between_turns_or_started_anew(tokenizer):
    """A full ring cannot go back to a shorter prefix: the prompt is computed again."""
    model = small_model(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=512,
        sliding_window=16,
    )
    session = session_of(model, tokenizer, GenerationConfig(max_new_tokens=12, eos_token_id=2))
    for text in ("Hello there", "What is a list?", "More"):
        prompt, _ = say(session, text)
        cold = model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, eos_token_id=2)
        answer = list(session.turns[-1].answer)
        assert cold[0, len(prompt.ids) :].tolist()[: len(answer)] == answer
    assert session.stats.cached_tokens > 20
    session.turns.pop()
    prompt, _ = say(session, "Something else")
    assert prompt.cached_tokens == 0
    cold = model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, eos_token_id=2)
    answer = list(session.turns[-1].answer)
    assert cold[0, len(prompt.ids) :].tolist()[: len(answer)] == answer


def answer_of(session, prompt, count):
    """Greedy ids after a prompt, computed without any cache of the session's."""
    cold = session.model.causal_lm.generate(
        torch.tensor([prompt.ids]), max_new_tokens=count, eos_token_id=2
    )[0, len(prompt.ids) :]
    return cold.tolist()


@pytest.mark.parametrize("form", [chat_format, chatml])
def test_a_cut_reply_goes_on_where_it_ended(tokenizer, form):
    session = make(tokenizer, chat_format=form(tokenizer))
    first, begun = say(session, "Hello")
    assert session.stats.finish == "length"
    assert session.stats.cut
    more = session.prepare_continuation()
    assert more.ids == (*first.ids, *session.turns[0].answer)
    assert more.cached_tokens == len(more.ids) - 1  # nothing is computed again but the last id
    rest = "".join(session.reply(more))
    assert len(session.turns) == 1
    assert session.turns[0].answer == tuple(answer_of(session, first, 24))
    assert begun + rest == session.text_of(session.turns[0])


def test_an_answer_that_fills_the_context_goes_on_without_its_beginning(tokenizer):
    session = make(tokenizer, context=64)
    session.config = GenerationConfig(eos_token_id=-1, max_new_tokens=4000)
    say(session, "Hello")
    assert session.stats.finish == "context"
    length = len(session.turns[0].answer)
    for _ in range(2):
        more = session.prepare_continuation()
        assert more.dropped_tokens > 0
        assert more.ids[-8:] == session.turns[0].answer[-8:]
        "".join(session.reply(more))
        assert len(session.turns[0].answer) > length
        length = len(session.turns[0].answer)
    prompt, _ = say(session, "And now")
    assert len(prompt.ids) <= 64


def test_a_whole_reply_does_not_go_on(tokenizer):
    session = make(tokenizer)
    say(session, "Hello")
    eos = session.turns[0].answer[3]
    session.clear()
    session.config = GenerationConfig(max_new_tokens=12, eos_token_id=eos)
    say(session, "Hello")
    assert session.stats.finish == "stop"
    with pytest.raises(UsageError, match="the reply is whole"):
        session.prepare_continuation()
    assert len(session.turns) == 1
    stop = session.text_of(session.turns[0])[:2]
    session.clear()
    session.config = GenerationConfig(max_new_tokens=12, stop_strings=stop)
    say(session, "Hello")
    assert session.stats.finish == "stop_string"
    assert not session.stats.cut


def test_another_answer_replaces_the_last_one(tokenizer):
    session = make(tokenizer)
    say(session, "Hello")
    say(session, "And")
    greedy = session.turns[1].answer
    prompt = session.prepare_again(temperature=3.0)
    assert prompt.config.do_sample
    "".join(session.reply(prompt))
    assert [turn.user for turn in session.turns] == ["Hello", "And"]
    assert not session.config.do_sample
    "".join(session.reply(session.prepare_again()))
    assert session.turns[1].answer == greedy
    session.config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=3.0, seed=5)
    drawn = set()
    for _ in range(3):
        "".join(session.reply(session.prepare_again()))
        drawn.add(session.turns[1].answer)
    assert len(drawn) == 3  # one seed, and three answers
    begun = session.turns[1].answer
    "".join(session.reply(session.prepare_continuation()))
    assert session.turns[1].answer[12:] != begun


def test_an_answer_stays_if_its_successor_is_stopped_before_the_first_token(tokenizer):
    session = make(tokenizer)
    say(session, "Hello")
    before, original = session.turns[0], session.model.causal_lm.next_logits

    def interrupted(*_):
        raise KeyboardInterrupt

    session.model.causal_lm.next_logits = interrupted
    for prepare in (session.prepare_again, session.prepare_continuation):
        with pytest.raises(KeyboardInterrupt):
            list(session.reply(prepare()))
        assert session.turns == [before]
        assert session.stats.finish == "stopped"
    with pytest.raises(UsageError, match="does not fit"):
        session.prepare_again("word " * 2000)
    assert session.turns == [before]
    session.model.causal_lm.next_logits = original


def test_undo_forgets_the_last_turn_and_clear_the_statistics(tokenizer):
    session = make(tokenizer)
    first, _ = say(session, "Hello")
    say(session, "And")
    assert session.undo().user == "And"
    again = session.prepare("And")
    assert again.ids[: len(first.ids)] == first.ids
    session.clear()
    assert session.stats is None
    for change in (session.undo, session.prepare_again, session.prepare_continuation):
        with pytest.raises(UsageError, match="no turn yet"):
            change()


def test_the_probabilities_of_a_reply_are_those_of_its_sampler(tokenizer):
    session = make(tokenizer)
    session.config = GenerationConfig(
        max_new_tokens=6, do_sample=True, temperature=0.7, top_k=3, seed=1
    )
    prompt, _ = say(session, "Hello")
    out = session.model.causal_lm.generate(
        torch.tensor([prompt.ids]),
        session.config,
        return_dict_in_generate=True,
        output_scores=True,
    )
    choices, answer = session.last.choices(), session.turns[0].answer
    for choice, index, scores in zip(choices, answer, out.scores, strict=True):
        expected = scores[0].softmax(-1)
        assert choice.piece == tokenizer.convert_ids_to_tokens(index)
        assert choice.probability == pytest.approx(float(expected[index]), rel=1e-4)
        likeliest = max(choice.probability, choice.others[0][1])
        assert likeliest == pytest.approx(float(expected.max()), rel=1e-4)
        assert [share > 0 for _, share in choice.others] == [True] * 2 + [False] * 2
