"""A chat with a server's model: ours, which tells all, and others, which tell less."""

import json
from contextlib import ExitStack

import pytest

from qmix.commands.chat.chat_model import ServerError
from qmix.commands.chat.remote_model import RemoteModel, filled
from qmix.commands.chat.server import Server
from qmix.commands.session import Session
from qmix.errors import CUT_REPLY, UsageError
from qmix.generation.config import GenerationConfig
from qmix.text import chat_template
from tests.support.fake_openai import DONE, event, faking
from tests.support.http_server import serving
from tests.support.process import piped, qmix, succeeds, typed

GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6).attributed("the command line")
ASK = "def add(a, b):"


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served


@pytest.fixture
def fake():
    with faking() as fake:
        yield fake


@pytest.fixture
def session_with():
    """Begins conversations with the model at an address."""
    with ExitStack() as stack:

        def begin(url, config=GREEDY, **options):
            model = RemoteModel(stack.enter_context(Server(url)))
            return Session(model, filled(config), **options)

        yield begin


@pytest.fixture
def session(served, session_with):
    return session_with(served.url)


def say(session, prepared):
    return "".join(session.reply(prepared))


def written(served, prompt, new=6):
    """What the server's model writes after ids, without the server."""
    import torch

    ids = served.model.generate(torch.tensor([prompt]), max_new_tokens=new, eos_token_id=2)
    return served.tokenizer.decode(ids[0, len(prompt) :])


def test_a_conversation_is_that_of_the_model_here(served, session):
    first = say(session, session.prepare(ASK))
    assert first == written(
        served, chat_template.encode([{"role": "user", "content": ASK}], served.tokenizer)
    )
    stats = session.stats
    assert (stats.new_tokens, stats.finish, stats.context_limit) == (6, "length", 256)
    assert stats.prompt_tokens == len(session.last.prompt.ids)
    assert 0 < stats.first_token_s <= stats.elapsed_s
    more = say(session, session.prepare_continuation())
    assert session.text_of(session.turns[0]) == first + more
    assert session.stats.cached_tokens > 0
    session.config = session.config.updated({"max_new_tokens": 12})
    assert say(session, session.prepare_again()) == first + more
    say(session, session.prepare("and"))
    assert session.undo().user == "and"
    assert [turn.user for turn in session.turns] == [ASK]


def test_a_full_context_drops_turns_as_it_does_here(session):
    session.config = session.config.updated({"max_new_tokens": 2})
    dropped = 0
    for index in range(4):
        prepared = session.prepare(f"Tell me about number {index}. " * 9)
        say(session, prepared)
        dropped += prepared.dropped_turns
    assert dropped > 0
    with pytest.raises(UsageError, match="does not fit the context"):
        session.prepare("word " * 300)


def test_leaving_a_reply_ends_it_on_the_server_and_keeps_what_came(served, session):
    before = served.engine.counts.cancelled
    session.config = session.config.updated({"max_new_tokens": 200})
    texts = session.reply(session.prepare(ASK))
    begun = next(texts)
    texts.close()
    assert session.text_of(session.turns[0]) == begun
    assert session.stats.finish == "stopped"
    assert session.stats.cached_tokens is None  # the server told no more
    assert "cached" not in session.stats.line()
    served.until_idle()
    assert served.engine.counts.cancelled == before + 1


def test_commands_look_into_a_reply_of_our_server(served, session):
    lines = (
        f"{ASK}\n/tokens\n/tokens ab\n/prompt\n/probs\n/experts\n/regen\n/experts\n/stats\n/model\n"
    )
    _, notices = typed(session, lines)
    for part in (
        *("message 7, reply 6", f"[INST] {ASK} [/INST]", "before temperature and filters"),
        *("the experts of this reply were not asked for", "busiest: layer", "conversation  2"),
        f"tiny · {served.url} · context 256 · temperature 0 (greedy, from the command line)",
    ):
        assert part in notices, notices
    assert "memory allows" not in notices
    assert sum(session.last.expert_counts()[0]) == 6 * 2


def test_settings_that_nobody_gave_are_the_servers_and_are_not_sent(fake, session_with):
    fake.streams = [event("a", "stop") + DONE] * 3
    session = session_with(fake.url, GenerationConfig(), system="Be brief.")
    _, notices = typed(
        session, "Hi\n/set temperature\n/set top_p 0.5\n/set seed 3\n/regen 0\nMore\n"
    )
    first, second, third = fake.chats
    assert first == {
        "model": "other",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert notices.splitlines()[1].split() == ["temperature", "-", "the", "server"]
    assert {name: second[name] for name in ("temperature", "top_p", "seed")} == {
        "temperature": 0,
        "top_p": 0.5,
        "seed": 4,
    }
    assert "temperature" not in third
    assert third["messages"][-2:] == [
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "More"},
    ]


def test_a_server_that_tells_less_is_talked_to_and_what_is_missing_is_named(fake, session_with):
    fake.streams = [event("a") + event("b", "length") + DONE] * 2
    choice = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "c", "logprob": -1.0}]}
    fake.streams += [event("a", "stop", logprobs={"content": [choice]}) + DONE]
    session = session_with(fake.url, GenerationConfig())
    text, notices = typed(
        session,
        "Hi\n/tokens\n/tokens a\n/prompt\n/experts\n/probs\n/continue\n/regen\n/probs\n/stats\n",
    )
    assert text == "ab\nab\na\n"
    assert (session.stats.prompt_tokens, session.stats.context_tokens) == (None, None)
    assert "context" not in session.stats.line()
    assert "prompts" not in notices
    for part in (
        "the server does not tell the tokens of a text",
        "the server does not tell what it made of this prompt",
        "the server does not tell which experts wrote a reply",
        "the probabilities of this reply were not asked for",
        "60.7 %",
    ):
        assert part in notices, notices
    assert [chat.get("continue_final_message") for chat in fake.chats] == [None, True, None]
    assert fake.chats[1]["messages"][-1] == {"role": "assistant", "content": "ab"}
    assert [path for path, _ in fake.asked].count("/tokenize") == 1
    assert "cut short: length" in notices


@pytest.mark.parametrize("end", [b"", b"data: {oops\n\n", b'data: {"choices": 3}\n\n', b"data: {"])
def test_a_server_that_is_gone_in_the_middle_leaves_the_conversation(fake, session_with, end):
    fake.streams = [
        event("a", "stop") + DONE,
        event("b") + event("c") + end,
        event("d", "stop") + DONE,
    ]
    session = session_with(fake.url)
    say(session, session.prepare("one"))
    with pytest.raises(ServerError, match="What came of the reply is kept") as lost:
        say(session, session.prepare("two"))
    assert lost.value.exit_code == 4
    assert [session.text_of(turn) for turn in session.turns] == ["a", "bc"]
    say(session, session.prepare_continuation())
    assert session.text_of(session.turns[1]) == "bcd"


def test_a_person_goes_on_after_a_fault_and_a_pipe_does_not(fake, session_with):
    fake.streams = [event("a"), (503, b"{}"), event("b", "stop") + DONE]
    session = session_with(fake.url)
    text, notices = typed(session, "one\ntwo\nthree\n")
    assert text == "a\n\nb\n"
    assert [turn.user for turn in session.turns] == ["one", "three"]
    assert "the reply ended in the middle" in notices
    assert "found no reason. The conversation is as it was." in notices
    fake.streams = [event("a"), event("b", "stop") + DONE]
    with pytest.raises(ServerError):
        piped(session_with(fake.url), "one\ntwo\n")
    assert len(fake.streams) == 1


def test_a_server_that_tells_no_usage_is_asked_for_it_once(fake, session_with):
    """As Mistral's API does, whose error names the field in a list of its own."""
    loc = {"type": "extra_forbidden", "loc": ["body", "stream_options", "include_usage"]}
    refusal = json.dumps({"object": "error", "message": {"detail": [loc]}}).encode()
    fake.streams = [(422, refusal), event("a", "stop") + DONE, event("b", "stop") + DONE]
    session = session_with(fake.url)
    for text in ("one", "two"):
        say(session, session.prepare(text))
    assert [session.text_of(turn) for turn in session.turns] == ["a", "b"]
    assert ["stream_options" in chat for chat in fake.chats] == [True, False, False]
    fake.streams = [(422, refusal)]
    with pytest.raises(UsageError, match="extra_forbidden"):  # of something else
        say(session, session.prepare("three"))


def test_a_stream_without_a_reply_and_a_model_that_is_a_path(fake, session_with):
    """As llama-cpp-python's server answers a prompt that does not fit its context."""
    fake.answers["/v1/models"] = {"data": [{"id": "/models/some.gguf"}]}
    fake.streams = [b""]
    session = session_with(fake.url)
    assert session.model.facts()[0] == "some.gguf"
    with pytest.raises(ServerError, match=r"sent no reply.*as it was.*fit the server's context"):
        say(session, session.prepare("one"))
    assert fake.chats[0]["model"] == "/models/some.gguf"
    assert session.turns == []


def test_a_document_keeps_what_came_before_the_server_was_gone(fake):
    """One document a reply, also for the one that failed; without any text, the error alone."""
    command = ("chat", "--connect", fake.url)
    fake.streams = [event("a", "stop") + DONE, event("b") + event("c")]
    done = qmix(*command, "--lines", "--json", stdin="one\ntwo\nthree\n")
    whole, cut = map(json.loads, done.stdout.splitlines())
    assert (done.returncode, done.stderr) == (4, "")
    assert (whole["text"], whole["finish"], "error" in whole) == ("a", "stop", False)
    assert (cut["text"], cut["finish"], cut["cut"]) == ("bc", "error", True)
    assert (cut["error"], cut["exit_code"]) == ("the reply ended in the middle", 4)
    fake.streams = [(503, b"{}")]
    done = qmix(*command, "one", "--json")
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (4, 4)


def test_one_message_and_pipes(served, monkeypatch):
    asked = ("chat", "--connect", served.url, "--temperature", 0, "--max-new-tokens", 3)
    done = qmix(*asked, "Hi //there", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["finish"], document["cut"]) == (CUT_REPLY, "length", True)
    assert (document["model"], document["new_tokens"]) == ("tiny", 3)
    raw = qmix(*asked, "Hi //there", "--quiet")
    assert (raw.returncode, raw.stdout, raw.stderr) == (CUT_REPLY, document["text"] + "\n", "")
    piped = qmix(*asked, "--stop", "e", stdin="Hi //there")
    assert piped.returncode in (0, CUT_REPLY)
    done = qmix(*asked, "--lines", "--json", stdin="Hi\n/undo\n")
    first, second = map(json.loads, done.stdout.splitlines())
    assert 0 < first["context_tokens"] < second["prompt_tokens"]
    refused = qmix("chat", "--connect", served.url, "Hi", "--temperature", 3)
    assert refused.returncode == 2
    assert "temperature" in refused.stderr


def test_a_model_is_chosen_by_name_and_the_key_comes_from_a_file(fake, tmp_path, monkeypatch):
    fake.answers["/v1/models"] = {"data": [{"id": "a"}, {"id": "b", "max_model_len": 512}]}
    done = qmix("chat", "--connect", fake.url, "Hi")
    assert done.returncode == 2
    assert "which of its models?; expected --model with one of a, b" in done.stderr
    assert "no such model" in qmix("chat", "--connect", fake.url, "--model", "c", "Hi").stderr
    (tmp_path / "key").write_text("from-file\n")
    monkeypatch.setenv("QMIX_API_KEY", "from-environment")
    fake.streams = [event("x", "stop") + DONE] * 2
    one = ("chat", "--connect", fake.url, "--model", "b", "Hi")
    done = qmix(*one, "--json", "--api-key-file", tmp_path / "key")
    assert json.loads(done.stdout)["context_limit"] == 512
    assert fake.keys[-1] == "Bearer from-file"
    assert (qmix(*one).returncode, fake.keys[-1]) == (0, "Bearer from-environment")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("Hi", "there"), "takes the place of MODEL"),
        (("Hi", "--device", "cpu"), "--device is for a model that is loaded here"),
        (("Hi", "--ctx", "2k"), "--ctx is for"),
        ((), "there is no message"),
    ],
)
def test_what_says_how_to_load_a_model_is_refused(arguments, said):
    done = qmix("chat", "--connect", "http://127.0.0.1:1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_server_that_is_not_there_ends_with_one_line():
    done = qmix("chat", "--connect", "http://127.0.0.1:1", "Hi")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert "does not answer" in done.stderr
    assert "expected MODEL or --connect URL" in qmix("chat").stderr


def test_no_torch_is_loaded(fake):
    fake.streams = [event("x", "stop") + DONE]
    code = (
        "import sys; from qmix.cli import app\n"
        "sys.argv[1:] = ['chat', '--connect', sys.argv[1], 'Hi']\n"
        "app(standalone_mode=False)\n"
        "print([name for name in ('torch', 'numpy', 'huggingface_hub') if name in sys.modules])"
    )
    assert succeeds(code, fake.url) == "x\n[]\n"
