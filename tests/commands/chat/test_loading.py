"""A chat's model: what is said of it, what it reports while it is read, and another instead."""

import io

import pytest
from rich.console import Console

from qmix import GenerationConfig
from qmix.commands import options
from qmix.commands.chat.loading import ChatLoader
from qmix.commands.chat.local_facts import bound
from qmix.commands.repl import Repl, Streams
from qmix.errors import ResourceError, WriteError
from qmix.models import auto
from tests.support.models import TINY
from tests.support.process import Keyboard, without_prompts


@pytest.fixture
def chat(tiny_nf4, monkeypatch):
    """Starts a chat with the tiny model in 4 bits: typed lines -> (chat, notices)."""
    monkeypatch.setenv("TERM", "dumb")

    def start(lines, context=None, reuse=options.REUSE, **load):
        defaults = GenerationConfig(do_sample=False, max_new_tokens=3).attributed("qmix")
        loader = ChatLoader(options.Load(device="cpu", **load), context, None, defaults, reuse)
        notices = io.StringIO()
        console = Console(file=notices, width=120, color_system=None)
        streams = Streams(Keyboard(lines), io.StringIO(), console)
        repl = Repl.loaded(loader, tiny_nf4, GenerationConfig(), streams, "Be brief.")
        repl.run()
        return repl, without_prompts(notices.getvalue())

    return start


def test_the_first_line_says_what_is_loaded(chat, tiny_nf4):
    _, notices = chat("/model\n")
    assert notices == (
        f"{tiny_nf4.name} · 6.267 M · 6.26 bits · 4.6 MiB on cpu · context 1,024 · [INST] template"
        "\n  temperature 0 (greedy, qmix's default)\n"
    )


def test_an_offloaded_model_says_where_its_experts_are(chat):
    repl, _ = chat("Hi\n", ram="463MiB")
    statistics = repl.session.stats.experts
    assert statistics.disk > 0
    assert "experts" in repl.start_line
    assert "on disk" in repl.start_line
    slow = bound(repl.session.model, 0, statistics)
    assert 0 < slow.tokens_per_s < bound(repl.session.model, 0, None).tokens_per_s


def test_a_conversation_is_as_long_as_the_budget_leaves_room_for(chat, monkeypatch):
    monkeypatch.setattr("qmix.planning.plan.CONTEXT", 128)
    for given, context in (
        ({}, 1024),
        ({"ram": "463MiB"}, 128),
        ({"ram": "463MiB", "context": 256}, 256),
    ):
        repl, _ = chat("Hi\n", **given)
        assert repl.session.context == context
        assert repl.session.stats.context_limit == context


@pytest.mark.parametrize("load", [{}, {"ram": "1G"}])
def test_a_model_with_fewer_positions_than_the_context_has_those(chat, load):
    repl, _ = chat("Hi\n", context=1 << 14, **load)
    assert repl.session.context == 1024


def test_a_folder_of_prompts_is_refused_before_the_model_is_read(chat, tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "load", None)
    (tmp_path / "prompts").write_text("a file")
    with pytest.raises(WriteError, match="Not a directory"):
        chat("Hi\n", reuse=options.Reuse(prompt_cache=tmp_path / "prompts"))


def test_another_model_takes_over_the_words_and_the_settings(chat):
    repl, notices = chat(f"Hello\n/set max_new_tokens 2\n/model {TINY}\n/set max_new_tokens\nAnd\n")
    assert repl.directory == TINY
    assert [turn.user for turn in repl.session.turns] == ["Hello", "And"]
    assert repl.session.turns[0].answer
    assert (repl.session.system, repl.session.config.max_new_tokens) == ("Be brief.", 2)
    assert "freeing tiny-nf4; the conversation stays" in notices
    assert "16.00 bits" in notices


def test_a_model_that_does_not_load_leaves_a_chat_that_goes_on(chat, monkeypatch, tiny_nf4):
    load, models = auto.load, []

    def failing(directory, **more):
        models.append(directory)
        if directory == TINY:
            raise ResourceError("the GPU has no memory left")
        return load(directory, **more)

    monkeypatch.setattr("qmix.models.auto.load", failing)
    repl, notices = chat(f"Hello\n/model {TINY}\nAnd\n/model /nowhere\nMore\n")
    assert models == [tiny_nf4, TINY, tiny_nf4]
    assert "no memory left" in notices
    assert "loading tiny-nf4 again" in notices
    assert "/nowhere: no such directory" in notices
    assert [turn.user for turn in repl.session.turns] == ["Hello", "And", "More"]


@pytest.mark.parametrize("ram", [None, "463MiB"])
def test_a_load_tells_what_it_has_read(tiny_nf4, ram):
    told = []
    auto.load(tiny_nf4, device="cpu", ram=ram, progress=lambda *read: told.append(read))
    assert told == sorted(told)
    done, total = told[-1]
    size = sum(path.stat().st_size for path in tiny_nf4.glob("*.safetensors"))
    assert 0.99 * total <= done <= total
    assert 0.3 * size < total <= size
