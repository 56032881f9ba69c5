"""generate and chat take what is not given from generation_config.json, then from themselves."""

import io
import json

import pytest
from rich.console import Console

from qmix import GenerationConfig
from qmix.commands import options
from qmix.commands.chat import command
from qmix.commands.chat.loading import ChatLoader
from qmix.commands.options import Sampling
from qmix.commands.repl import Repl, Streams
from tests.support.process import Keyboard, qmix, without_prompts


@pytest.fixture
def stating(small_checkpoint):
    def write(**document):
        (small_checkpoint / "generation_config.json").write_text(json.dumps(document))
        return small_checkpoint

    return write


@pytest.fixture
def chat(monkeypatch):
    """What a chat with a folder's model says to lines that are typed into it."""
    monkeypatch.setenv("TERM", "dumb")

    def say(folder, lines, **given):
        defaults = GenerationConfig(**command._DEFAULTS).attributed("qmix")
        loader = ChatLoader(options.Load(device="cpu"), None, None, defaults)
        notices = Console(file=io.StringIO(), width=100, color_system=None)
        streams = Streams(Keyboard(lines), io.StringIO(), notices, quiet=True)
        Repl.loaded(loader, folder, Sampling(**given).parse(None), streams).run()
        return without_prompts(notices.file.getvalue()).splitlines()

    return say


def tokens(result):
    assert result.returncode == 0, result.stderr
    return int(result.stderr.split(" tokens in ")[0].split()[-1])


def test_generate_is_as_long_and_as_greedy_as_the_checkpoint_says(stating):
    folder = stating(max_new_tokens=3, eos_token_id=-1, do_sample=True, temperature=0.9)
    drawn = [qmix("generate", folder, "a", "--seed", seed) for seed in range(4)]
    assert {tokens(result) for result in drawn} == {3}
    assert len({result.stdout for result in drawn}) > 1
    greedy = [
        qmix("generate", folder, "a", "--temperature", "0", "--max-new-tokens", "5")
        for _ in range(2)
    ]
    assert tokens(greedy[0]) == 5
    assert greedy[0].stdout == greedy[1].stdout


def test_what_nobody_asked_for_is_cut_to_the_models_positions(stating):
    folder = stating(max_new_tokens=10_000, eos_token_id=-1)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 32
    (folder / "config.json").write_text(json.dumps(config))
    assert tokens(qmix("generate", folder, "a")) < 32
    refused = qmix("generate", folder, "a", "--max-new-tokens", 10_000)
    assert refused.returncode == 2
    assert "exceed the context; expected at most 32;" in refused.stderr


def test_a_text_is_as_long_as_the_budget_leaves_room_for(stating, monkeypatch):
    folder = stating(max_new_tokens=10_000, eos_token_id=-1)
    monkeypatch.setattr("qmix.planning.plan.CONTEXT", 40)
    assert tokens(qmix("generate", folder, "a", "--ctx", 20)) == 18
    assert tokens(qmix("generate", folder, "a", "--ram", "1G")) == 38
    assert tokens(qmix("generate", folder, "a", "--ram", "1G", "--ctx", 50)) == 48
    refused = qmix("generate", folder, "a", "--ram", "1G", "--max-new-tokens", 39)
    assert refused.returncode == 2
    assert "--ctx" in refused.stderr


def test_set_says_who_gave_each_value(stating, chat):
    folder = stating(temperature=0.2, top_p=0.9, repetition_penalty=1.1)
    typed = "/set seed 3\n/set\n/set temperature 0\n/set temperature\n"
    shown = chat(folder, typed, top_p=0.5)
    assert shown[0] == "seed: 3, was none"
    assert [line.split(maxsplit=2) for line in shown[1:8]] == [
        ["temperature", "0.2", "generation_config.json"],
        ["top_k", "0", "qmix"],
        ["top_p", "0.5", "the command line"],
        ["min_p", "0.05", "qmix"],
        ["repetition_penalty", "1.1", "generation_config.json"],
        ["max_new_tokens", "1024", "qmix"],
        ["seed", "3", "/set"],
    ]
    assert shown[8] == "temperature: 0 (greedy), was 0.2"
    assert shown[9].split(maxsplit=1) == ["temperature", "0 (greedy)   /set"]


def test_a_checkpoint_that_says_do_not_sample_is_not_sampled_in_a_chat(stating, chat):
    folder = stating(do_sample=False, temperature=0.9)
    shown = chat(folder, "/set temperature\n")
    assert shown[0].split(maxsplit=1) == ["temperature", "0 (greedy)   generation_config.json"]
    assert Sampling(temperature=0.5).parse(None).do_sample
