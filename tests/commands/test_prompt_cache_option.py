"""--prompt-cache and --speculate: the same text, and less to compute."""

import json

import pytest

from qmix.generation.config import GenerationConfig
from qmix.generation.prompt_cache import PromptCache
from qmix.text.tokenizer import LlamaTokenizer
from tests.support.models import TINY, small_model
from tests.support.process import qmix, session_of

PROMPT = "def area(width, height):\n    return width * height\n\n\n" * 3


def said(*arguments, stdin=None):
    done = qmix(*arguments, "--device", "cpu", "--temperature", 0, "--json", stdin=stdin)
    assert done.returncode in (0, 6), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done


@pytest.fixture
def kept(tmp_path):
    return ("--prompt-cache", tmp_path / "prompts")


def test_a_prompt_that_was_read_before_is_not_read_again(tiny_nf4, kept):
    def generated(prompt, *options):
        (document,), _ = said("generate", tiny_nf4, prompt, "--max-new-tokens", 12, *options)
        return document["text"], document["cached_tokens"], document["prompt_tokens"]

    plain = generated(PROMPT)
    assert plain[1] == 0
    assert generated(PROMPT, *kept) == plain
    text, cached, tokens = generated(PROMPT, *kept)
    assert (text, cached) == (plain[0], tokens - 1)
    _, cached, tokens = generated(f"{PROMPT}Something else", *kept)
    assert 0 < tokens - cached < 20


def test_a_chat_goes_on_from_what_was_saved(tmp_path):
    tokenizer = LlamaTokenizer.from_pretrained(TINY)
    model = small_model(vocab_size=len(tokenizer))
    config = GenerationConfig(max_new_tokens=20, eos_token_id=2)

    def conversation(prompts):
        return session_of(model, tokenizer, config, prompts=prompts)

    first = conversation(PromptCache(tmp_path / "prompts", "m"))
    for text in (PROMPT, "And then?"):
        list(first.reply(first.prepare(text)))
    assert first.keep_cache() == first.model.cache.length
    texts = [(turn.user, first.text_of(turn)) for turn in first.turns]
    answers = []
    for prompts, least in ((None, 0), (PromptCache(tmp_path / "prompts", "m"), 60)):
        loaded = conversation(prompts)
        loaded.restore(texts)
        prepared = loaded.prepare("And?")
        assert prepared.cached_tokens >= least
        assert (prepared.cached_tokens == 0) == (prompts is None)
        answers.append("".join(loaded.reply(prepared)))
    assert answers[0] == answers[1]
    assert conversation(None).keep_cache() == 0


def test_a_conversation_that_was_cleared_is_not_kept(tmp_path):
    model = small_model(vocab_size=len(LlamaTokenizer.from_pretrained(TINY)))
    session = session_of(
        model,
        LlamaTokenizer.from_pretrained(TINY),
        GenerationConfig(max_new_tokens=20, eos_token_id=2),
        prompts=PromptCache(tmp_path / "prompts", "m"),
    )
    list(session.reply(session.prepare(PROMPT)))
    session.clear()
    assert session.keep_cache() == 0
    assert list((tmp_path / "prompts").iterdir()) == []


def test_a_reply_stands_although_its_prompt_cannot_be_kept(tiny_nf4, kept, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qmix.formats.files.shard_writer.os.fsync", full)
    for command in ("generate", "chat"):
        with pytest.warns(UserWarning, match="a prompt was not kept: .*No space left"):
            documents, done = said(command, tiny_nf4, PROMPT, "--max-new-tokens", 12, *kept)
        assert documents[0]["new_tokens"] == 12
        assert done.returncode == (0 if command == "generate" else 6)


def test_an_unset_variable_is_not_the_working_folder(tiny_nf4, tmp_path):
    done = qmix("generate", tiny_nf4, PROMPT, "--prompt-cache", "", cwd=tmp_path)
    assert done.returncode == 2
    assert "--prompt-cache" in done.stderr
    assert list(tmp_path.glob("*.safetensors")) == []


def test_drafts_are_told_and_can_be_left_out(tiny_nf4):
    new = ("--max-new-tokens", 40)
    (drafted,), _ = said("generate", tiny_nf4, PROMPT, *new)
    (plain,), _ = said("generate", tiny_nf4, PROMPT, *new, "--speculate", "off")
    assert drafted["text"] == plain["text"]
    assert plain["drafts"] is None
    counts = drafted["drafts"]
    assert counts is None or counts["passes"] + counts["accepted"] == 39
