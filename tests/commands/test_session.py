"""The conversation: history, cache reuse, interruption and overflow."""

import pytest
import torch

from qmix.commands.session import Session
from qmix.errors import UsageError
from qmix.generation.config import GenerationConfig
from qmix.text import chat_template
from qmix.text.chat_template import Message
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model


@pytest.fixture(scope="module")
def tokenizer():
    return LlamaTokenizer.from_pretrained(TINY)


def make(tokenizer, **options):
    model = small_model(vocab_size=len(tokenizer), num_hidden_layers=2, max_position_embeddings=256)
    config = GenerationConfig(max_new_tokens=12, eos_token_id=2)
    return Session(model, tokenizer, config, **options)


def say(session, text):
    prompt = session.prepare(text)
    return prompt, "".join(session.reply(prompt))


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
        cold = session.model.generate(
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
    original, calls = session.model.next_logits, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    session.model.next_logits = interrupted
    prompt = session.prepare("Hello")
    with pytest.raises(KeyboardInterrupt):
        list(session.reply(prompt))
    assert len(session.turns[0].answer) == 3
    session.model.next_logits = original
    prompt, _ = say(session, "Again")
    cold = session.model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, eos_token_id=2)
    answer = session.turns[-1].answer
    assert tuple(cold[0, len(prompt.ids) :].tolist()[: len(answer)]) == answer


def test_an_interrupt_before_the_first_token_drops_the_message(tokenizer):
    session = make(tokenizer)

    def interrupted(*_):
        raise KeyboardInterrupt

    session.model.next_logits = interrupted
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
    session = Session(model, tokenizer, GenerationConfig(max_new_tokens=12, eos_token_id=2))
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
